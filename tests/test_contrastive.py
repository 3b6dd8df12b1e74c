"""The contrastive task: its outputs, its bank and its gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import DUAL_ENCODERS, VOCAB_SIZE, make_dual_encoder, pair_columns
from pairs_for_tests import contrastive_loop
from reference import gradient_loop, to_double
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.featurizing.devices import in_bfloat16
from hf_trak.gradients import GRADIENTS, check_gradients, select_parameters
from hf_trak.projectors import Identity
from hf_trak.tasks import AutoTask, Task, draw_rows, embed_bank, in_direction, vmappable_attention, with_bank

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule"),
]

N_BANK = 6
CASES = [(name, engine) for name in DUAL_ENCODERS for engine in GRADIENTS if (name, engine) != ("siglip2", "functional")]


def make_bank(task: Task, model: Any, rows: dict[str, list]) -> Task:
    batch = task.collate(rows, None)
    return with_bank(task, embed_bank(task, model, batch, torch.arange(len(batch["pair_keys"]))))


def make_case(name: str, n_rows: int = 4) -> tuple[Any, Task, dict[str, Tensor]]:
    """Return a model, its task with a bank of 6 pairs, and a batch whose first 2 rows are in the bank."""
    model = make_dual_encoder(name).eval()
    columns = pair_columns(name, 2 * N_BANK)
    task = make_bank(AutoTask.from_model(model), model, {key: values[:N_BANK] for key, values in columns.items()})
    return model, task, task.collate({key: values[N_BANK - 2 : N_BANK - 2 + n_rows] for key, values in columns.items()}, None)


def features_of(model: Any, task: Task, batch: dict[str, Tensor], engine: str = "layerwise", **options: Any) -> Any:
    parameters = select_parameters(model, options.pop("patterns", None)).parameters
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    with vmappable_attention(model):
        return GRADIENTS[engine](
            model,
            batch,
            output_function=options.pop("output_function", task.output_function),
            parameters=parameters,
            projector=Identity(proj_dim=sum(sizes.values()), sizes=sizes),
        )


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert ((actual.double() - expected.double()).norm(dim=-1) <= relative * expected.double().norm(dim=-1)).all()


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_output_and_out_to_loss_are_the_equations(name: str):
    model, task, batch = make_case(name)
    model, batch = model.double(), to_double(batch)
    output, out_to_loss = task.output_function(model, batch)
    images, (texts, *_) = task.output_function.embed(model, batch)
    bank = task.output_function.bank
    pairs = list(zip(bank.images.numpy(), bank.texts.numpy(), strict=True))
    bias = model.logit_bias.item() if hasattr(model, "logit_bias") else None
    for row in range(4):
        others = [pair for i, pair in enumerate(pairs) if not (row < 2 and i == N_BANK - 2 + row)]
        assert len(others) == (5 if row < 2 else 6)
        expected = contrastive_loop(
            images[row].detach().numpy(), texts[row].detach().numpy(), others, model.logit_scale.exp().item(), bias
        )
        assert output[row].item() == pytest.approx(expected[0], rel=1e-9)
        assert out_to_loss[row].item() == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_gradients_equal_a_float64_loop(name: str, engine: str):
    model, task, batch = make_case(name)
    parameters = dict(select_parameters(model).parameters)
    output, out_to_loss, grads = gradient_loop(model, batch, task.output_function, list(parameters))
    result = features_of(model, task, batch, engine)
    assert_close(result.features, grads, 5e-6)
    assert_close(result.output, output, 1e-5)
    assert_close(result.out_to_loss, out_to_loss, 1e-5)
    blocks = dict(zip(parameters, grads.split([p.numel() for p in parameters.values()], dim=1), strict=True))
    # Each of these has a gradient, which the check above would not miss.
    wanted = ["logit_scale", "vision_model", "text_model", "position_embedding"]
    wanted += (
        ["visual_projection", "text_projection"]
        if "siglip" not in name
        else ["logit_bias", "in_proj_weight", "out_proj.weight", "probe"]
    )
    wanted += ["class_embedding", "patch_embedding"] if "clip" in name and "siglip" not in name else []
    for part in wanted:
        assert any(part in key and (block.norm(dim=1) > 1e-9).all() for key, block in blocks.items()), part


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_row_does_not_depend_on_its_batch_mates(name: str):
    model, task, batch = make_case(name, n_rows=5)
    whole = features_of(model, task, batch)
    for rows in ([0], [4, 1]):
        part = features_of(model, task, {key: values[rows] for key, values in batch.items()})
        assert_close(part.features, whole.features[rows], 5e-6)
        assert_close(part.output, whole.output[rows], 1e-5)
        assert_close(part.out_to_loss, whole.out_to_loss[rows], 1e-5)


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_the_check_of_the_first_examples_passes(name: str):
    model, task, batch = make_case(name, n_rows=2)
    parameters = select_parameters(model).parameters
    options = {"output_function": task.output_function, "parameters": parameters}
    check_gradients(model, lambda rows: {key: value[list(rows)] for key, value in batch.items()}, 2, **options)
    assert "get_parameter" not in model.__dict__


@pytest.mark.parametrize(
    "patterns", [["logit_scale"], ["^vision_model", "visual"], ["^text_model"], ["logit_scale", "text_projection"]]
)
def test_a_selection_of_parameters_is_those_columns_of_the_whole(patterns: list[str]):
    model, task, batch = make_case("clip")
    names = list(select_parameters(model, patterns).parameters)
    _, _, grads = gradient_loop(model, batch, task.output_function, names)
    for engine in GRADIENTS:
        # The temperature's derivative is a small difference of large terms.
        assert_close(features_of(model, task, batch, engine, patterns=patterns).features, grads, 5e-5)


@pytest.mark.parametrize("engine", GRADIENTS)
def test_under_autocast_features_are_close_and_logits_are_not_rounded(engine: str):
    model, task, batch = make_case("clip")
    output_function = in_bfloat16(task.output_function, device_type="cpu", vmapped=engine == "functional")
    result = features_of(model, task, batch, engine, output_function=output_function)
    expected = features_of(model, task, batch, engine)
    assert result.features.dtype == torch.float32
    assert not torch.equal(result.features, expected.features)
    assert (torch.cosine_similarity(result.features, expected.features) > 0.98).all()


# What is wrong with the reference (MadryLab/trak 0.3.2), one by one.


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_out_to_loss_is_one_number_per_example_and_not_zero_for_a_batch_of_one(name: str):
    model, task, batch = make_case(name)
    _, out_to_loss = task.output_function(model, batch)
    _, alone = task.output_function(model, {key: values[:1] for key, values in batch.items()})
    assert out_to_loss.shape == (4,)
    assert alone.shape == (1,)
    assert alone.item() == pytest.approx(out_to_loss[0].item(), rel=1e-5)
    assert 0.01 < alone.item() <= 1
    assert not out_to_loss.requires_grad


def test_every_row_is_as_likely_to_be_in_the_bank():
    n_rows, size, n_seeds = 10, 3, 600
    counts = torch.zeros(n_rows)
    for seed in range(n_seeds):
        rows = draw_rows(n_rows, size, seed)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == size
        counts[rows] += 1
    share, error = size / n_rows, (0.3 * 0.7 / n_seeds) ** 0.5
    assert ((counts / n_seeds - share).abs() < 4 * error).all(), counts


def test_the_draw_is_golden():
    assert draw_rows(1000, 5, 0).tolist() == [3, 206, 612, 626, 988]


def test_the_temperature_is_the_models_own_at_every_call():
    model, task, batch = make_case("clip")
    before, _ = task.output_function(model, batch)
    gradient_before = features_of(model, task, batch, patterns=["logit_scale"]).features
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    after, _ = task.output_function(model, batch)
    fresh, _ = make_bank_like(task, model).output_function(model, batch)
    assert torch.equal(after, fresh)
    assert (after - before).abs().min() > 0.1
    assert (features_of(model, task, batch, patterns=["logit_scale"]).features - gradient_before).abs().min() > 1e-3


def make_bank_like(task: Task, model: Any) -> Task:
    """A task of the same bank that has never seen another temperature."""
    return with_bank(AutoTask.from_model(model), task.output_function.bank)


def test_an_output_is_not_drawn_at_random_and_two_banks_live_side_by_side():
    model, task, batch = make_case("clip")
    other = make_bank(AutoTask.from_model(model), model, pair_columns("clip", 9, seed=5))
    first, second = task.output_function(model, batch)[0], other.output_function(model, batch)[0]
    assert torch.equal(task.output_function(model, batch)[0], first)
    assert (first - second).abs().min() > 1e-3


# The bank.


def test_no_gradient_reaches_the_bank():
    _, task, _ = make_case("clip")
    bank = task.output_function.bank
    assert not bank.images.requires_grad
    assert not bank.texts.requires_grad


def test_an_own_pair_is_left_out_by_its_content_whatever_its_padding_and_company():
    _, task, batch = make_case("clip", n_rows=6)
    bank = task.output_function.bank
    assert bank.owned_by(batch["pair_keys"]).sum(1).tolist() == [1, 1, 0, 0, 0, 0]
    columns = pair_columns("clip", 12)
    alone = task.collate({key: values[5:6] for key, values in columns.items()}, None)
    assert alone["input_ids"].shape[2] < batch["input_ids"].shape[2]
    assert alone["pair_keys"][0] == batch["pair_keys"][1]
    other_caption = {"pixel_values": columns["pixel_values"][5:6], "input_ids": columns["input_ids"][4:5]}
    assert not bank.owned_by(task.collate(other_caption, None)["pair_keys"]).any()


def test_all_of_a_batch_may_share_one_caption():
    _, task, _ = make_case("clip")
    columns = pair_columns("clip", 3)
    columns["input_ids"] = columns["input_ids"][:1] * 3
    keys = task.collate(columns, None)["pair_keys"]
    assert len(set(keys.tolist())) == 3


def test_a_bank_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match=r"`bank_size` is 11, but the training set has 10 rows"):
        draw_rows(10, 11, 0)
    assert len(draw_rows(10, None, 0)) == 10
    assert len(draw_rows(10_000, None, 0)) == 512
    with pytest.raises(ValueError, match="only one row"):
        draw_rows(1, None, 0)
    with pytest.raises(ValueError, match="at least 2, but is 1"):
        TrakConfig(bank_size=1)


def test_without_a_bank_there_is_no_output():
    model = make_dual_encoder("clip")
    task = AutoTask.from_model(model)
    with pytest.raises(ValueError, match=r"Call `make_bank\(train_dataset\)`"):
        task.output_function(model, task.collate(pair_columns("clip", 2), None))


# Several captions, and one tower's side.


@pytest.mark.parametrize("engine", GRADIENTS)
def test_a_row_of_several_captions_is_the_mean_over_them(engine: str):
    model, task, batch = make_case("clip", n_rows=3)
    extra = task.collate(pair_columns("clip", 3, seed=9), None)
    one, other = dict(batch), dict(batch)
    for key in ("input_ids", "attention_mask"):
        width = max(batch[key].shape[2], extra[key].shape[2])
        first, second = (torch.nn.functional.pad(x[key], (0, width - x[key].shape[2])) for x in (batch, extra))
        one[key], other[key] = first, second
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    both = {**batch, "caption_weights": weights}
    both |= {key: torch.cat([one[key], other[key]], 1) for key in ("input_ids", "attention_mask")}
    parts = [features_of(model, task, part, engine) for part in (one, other)]
    mean = features_of(model, task, both, engine)
    for name in ("features", "output", "out_to_loss"):
        first, second, found = (getattr(result, name) for result in (*parts, mean))
        expected = torch.stack([(first[0] + second[0]) / 2, first[1], (first[2] + second[2]) / 2])
        assert_close(found.reshape(3, -1), expected.reshape(3, -1), 1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_directions_split_the_output(name: str):
    model, task, batch = make_case(name)
    model, batch = model.double(), to_double(batch)
    outputs = {way: in_direction(task, way).output_function(model, batch) for way in ("pair", "image", "caption")}
    assert (outputs["image"][0] - outputs["caption"][0]).abs().min() > 1e-6
    if name == "clip":
        assert torch.allclose(outputs["image"][0] + outputs["caption"][0], outputs["pair"][0])
        assert torch.allclose((outputs["image"][1] + outputs["caption"][1]) / 2, outputs["pair"][1])
    else:  # losses add, once the own pairing that both have is taken off
        images, (texts,) = task.output_function.embed(model, batch)
        own = torch.nn.functional.softplus(-((images * texts).sum(1) * model.logit_scale.exp() + model.logit_bias))
        losses = {way: torch.nn.functional.softplus(-output) for way, (output, _) in outputs.items()}
        assert torch.allclose(losses["image"] + losses["caption"] - own, losses["pair"])
    with pytest.raises(ValueError, match="must be one of pair, image, caption, but is 'text'"):
        in_direction(task, "text")


def test_sigmoid_outputs_stay_finite_where_the_model_is_certain():
    from hf_trak.tasks.contrastive import sigmoid_contrast

    own = torch.zeros(2, 3, dtype=torch.bool)
    for logit in (200.0, -200.0):
        positive = torch.full((2, 1), logit, requires_grad=True)
        output, out_to_loss = sigmoid_contrast(positive, [torch.full((2, 3), -logit)] * 2, own)
        (grad,) = torch.autograd.grad(output.sum(), positive)
        assert output.isfinite().all()
        assert grad.isfinite().all()
        assert (output > 0).all() == (logit > 0)
        assert torch.allclose(out_to_loss, torch.full((2,), float(logit < 0)))


# Models.


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_the_task_is_found_and_its_loss_kind(name: str):
    task = AutoTask.from_model(make_dual_encoder(name))
    assert task.name == "contrastive"
    assert task.output_function.loss == ("sigmoid" if "siglip" in name else "softmax")


def test_siglips_captions_are_padded_as_in_its_training():
    task = AutoTask.from_model(make_dual_encoder("siglip"))
    batch = task.collate(pair_columns("siglip", 2), None)
    assert batch["input_ids"].shape == (2, 1, 10)
    assert "attention_mask" not in batch
    assert (batch["input_ids"] < VOCAB_SIZE).all()


def test_a_model_that_is_no_dual_encoder_is_refused():
    from models import make_model

    with pytest.raises(
        ValueError, match="BertForSequenceClassification with 3 labels serves text-classification, not contrastive"
    ):
        AutoTask.from_model(make_model("bert"), TrakConfig(task="contrastive"))
    from transformers import CLIPVisionModel

    tower = make_dual_encoder("clip").vision_model
    assert isinstance(tower, CLIPVisionModel)
    with pytest.raises(ValueError, match="No task serves CLIPVisionModel yet"):
        AutoTask.from_model(tower)


def test_siglip2_names_the_engine_that_serves_it():
    with pytest.raises(ValueError, match="Use gradients='layerwise'"):
        AutoTask.from_model(make_dual_encoder("siglip2"), TrakConfig(gradients="functional"))


def test_an_adapters_model_is_served():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_dual_encoder("clip"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=None)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    task = make_bank(AutoTask.from_model(model), model, pair_columns("clip", 6))
    batch = task.collate(pair_columns("clip", 3, seed=2), None)
    names = list(select_parameters(model).parameters)
    assert all("lora" in name for name in names)
    _, _, grads = gradient_loop(model, batch, task.output_function, names)
    assert_close(features_of(model, task, batch).features, grads, 1e-5)
    assert np.isfinite(grads.numpy()).all()


def test_a_column_of_images_that_are_not_decoded_is_opened():
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as pillow
    from transformers import CLIPImageProcessor

    from hf_trak.tasks.image_inputs import ImageInputs

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    features = Features({"image": Image(), "caption": Value("string")})
    decoded = Dataset.from_dict({"image": [pillow.fromarray(pixels)], "caption": ["a"]}, features=features)
    closed = decoded.cast_column("image", Image(decode=False))
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for column in (None, "image"):
        inputs = ImageInputs(column, "RGB")
        found, expected = (inputs.collate(rows[:], processor)["pixel_values"] for rows in (closed, decoded))
        assert torch.equal(found, expected)
