"""What rows really give: through transforms, twice the same, images of every make, columns besides the tokens."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import bert, convnext, resnet, vit
from tokenizers_for_tests import word_tokenizer
from torch import nn

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.featurizing.batching import read_rows
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.tasks import AutoTask, ImageInputs, Task
from hf_trak.tasks.pictures import check_pictures, find_image_columns
from hf_trak.tasks.rows import as_stored, features_of

SENTENCES = ["which example made my model", "do this", "and that one", "model do", "this and that", "my example"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module")
def image_processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 8, "width": 8})


def texts(**more: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": SENTENCES, "label": [0, 1, 2, 0, 1, 2], **more})


def arrays(n: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 9, 7, channels), dtype=np.uint8)


def pictures() -> datasets.Dataset:
    from PIL import Image

    images = [Image.fromarray(array) for array in arrays()]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"img": images, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def build(folder: Path, model: Any, dataset: Any, processing_class: Any = None, **options: Any) -> AttributionIndex:
    config = TrakConfig(proj_dim=32, **options)
    return AttributionIndex.build(
        folder, models=model, dataset=dataset, config=config, processing_class=processing_class, progress=False
    )


# Rows through a transform.


def test_a_transform_that_tokenizes_gives_the_features_of_the_same_rows_tokenized_before(tmp_path: Path, tokenizer: Any):
    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        return {**tokenizer(rows["text"], padding=True), "labels": rows["label"]}

    model = bert()
    through = texts().with_transform(tokenize)
    assert set(features_of(through)) == {"input_ids", "attention_mask", "labels"} | (
        {"token_type_ids"} & set(tokenizer.model_input_names)
    )
    before = texts().map(tokenize, batched=True, remove_columns=["text", "label"])
    expected = build(tmp_path / "before", model, before)
    found = build(tmp_path / "through", model, through)
    kinds = found.config, expected.config
    assert kinds[0] == kinds[1]
    assert kinds[0].label_column == "labels"
    np.testing.assert_array_equal(found.features()["trak_features"], expected.features()["trak_features"])
    np.testing.assert_array_equal(found.score(through, progress=False), expected.score(before, progress=False))


def test_a_transform_that_prepares_pixels_needs_no_image_processor(tmp_path: Path, image_processor: Any):
    def prepare(rows: dict[str, list]) -> dict[str, Any]:
        pixels = image_processor(rows["img"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "label": rows["label"]}

    model = vit()
    found = build(tmp_path / "through", model, pictures().with_transform(prepare))
    expected = build(tmp_path / "raw", model, pictures(), image_processor)
    np.testing.assert_allclose(found.features()["trak_features"], expected.features()["trak_features"], rtol=1e-5, atol=1e-7)
    assert found.config.image_column is None
    assert expected.config.image_column == "img"


@pytest.mark.parametrize("chance", [1.0, 0.1, 0.02])
def test_rows_that_are_not_the_same_twice_are_refused(tmp_path: Path, image_processor: Any, chance: float):
    rng = np.random.default_rng(0)

    def augment(rows: dict[str, list]) -> dict[str, Any]:
        pixels = image_processor(rows["img"], return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": [image.flip(-1) if rng.random() < chance / 2 else image for image in pixels],
            "label": rows["label"],
        }

    dataset = datasets.concatenate_datasets([pictures()] * 80).with_transform(augment)
    with pytest.raises(
        ValueError, match=r"not the same twice: of \d+ rows that were read again.*'pixel_values'.*with_transform"
    ):
        build(tmp_path / "index", vit(), dataset)
    assert not (tmp_path / "index").exists()


def test_a_transform_that_depends_on_the_rows_read_with_it_is_refused(tokenizer: Any):
    def centred(rows: dict[str, list]) -> dict[str, Any]:
        torch.manual_seed(0)  # the same noise at each call, but for another row
        pixels = torch.randn(len(rows["label"]), 3, 8, 8)
        return {"pixel_values": list(pixels), "label": rows["label"]}

    with pytest.raises(ValueError, match="not the same twice"):
        AutoTask.from_model(vit()).check(pictures().with_transform(centred), None)


def test_a_collator_of_ones_own_that_draws_is_refused():
    def masked(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([torch.tensor(row["x"]) * (torch.rand(4) < 0.85) for row in rows])}

    dataset = datasets.Dataset.from_dict({"x": np.ones((20, 4), dtype=np.float32)})
    task = Task.custom(lambda model, batch: model(batch["x"]).squeeze(1), collator=masked)
    with pytest.raises(ValueError, match=r"not the same twice.*'x'"):
        task.check(dataset, None)


def test_rows_without_chance_are_served_and_formats_are_set_aside():
    assert as_stored(texts()).column_names == ["text", "label"]
    shown = as_stored(texts(idx=list(range(6))).with_format("torch", columns=["label", "text"]))
    assert shown.column_names == ["text", "label"]
    assert isinstance(shown[0]["label"], int)


# Columns are decided on once.


def test_the_columns_found_are_part_of_the_index_and_queries_are_read_by_them(tmp_path: Path, tokenizer: Any, caplog: Any):
    train = texts(id=[f"r{i}" for i in range(6)], label_text=["low", "mid", "high"] * 2)
    model = bert()
    with caplog.at_level("INFO", logger="hf_trak"):
        index = build(tmp_path / "index", model, train, tokenizer)
    assert "Columns read: text = text; label = label." in caplog.text
    again = TrakConfig.from_pretrained(tmp_path / "index")
    assert again.text_columns == ("text",)
    assert again.label_column == "label"
    plain = build(tmp_path / "plain", model, texts(), tokenizer)
    np.testing.assert_array_equal(index.features()["trak_features"], plain.features()["trak_features"])
    # Going on with the same command is no change, and neither are queries with more columns.
    build(tmp_path / "index", model, train, tokenizer)
    queries = texts(review=SENTENCES)
    np.testing.assert_array_equal(index.score(queries, progress=False), plain.score(texts(), progress=False))
    with pytest.raises(ValueError, match=r"queries lack 'text'.*they have label, review"):
        index.score(queries.remove_columns("text"), progress=False)


def test_what_is_ambiguous_is_refused_before_anything_is_written(tmp_path: Path, tokenizer: Any):
    with pytest.raises(ValueError, match="ambiguous"):
        build(tmp_path / "index", bert(), texts(review=SENTENCES), tokenizer)
    assert not (tmp_path / "index").exists()
    index = build(tmp_path / "index", bert(), texts(review=SENTENCES), tokenizer, text_columns=("review", "text"))
    assert index.config.text_columns == ("review", "text")


def test_missing_texts_are_counted_and_named_before_any_work(tmp_path: Path, tokenizer: Any):
    dataset = datasets.Dataset.from_dict({"text": ["a model"] * 2500 + [None] + ["that"] * 499 + [None], "label": [0] * 3001})
    with pytest.raises(ValueError, match=r"2 of 3001 rows have no text \(None\) in 'text': rows 2500, 3000\. Filter"):
        build(tmp_path / "index", bert(), dataset, tokenizer)
    assert not (tmp_path / "index").exists()
    first = datasets.Dataset.from_dict({"text": [None, "a model"], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"1 of 2 rows have no text .*row 0\."):
        AutoTask.from_model(bert()).check(first, tokenizer)
    empty = datasets.Dataset.from_dict({"text": ["do this", " "], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"1 of 2 rows have an empty text.*row 1"):
        AutoTask.from_model(bert()).check(empty, tokenizer)


def test_a_featurizer_alone_reads_the_same_columns(tokenizer: Any):
    featurizer = Featurizer(bert(), TrakConfig(proj_dim=32), tokenizer)
    mapped = texts(label_text=["x y", "y z", "z x"] * 2).map(featurizer, batched=True, batch_size=2)
    expected = texts().map(featurizer, batched=True, batch_size=6)
    np.testing.assert_allclose(mapped["trak_features"], expected["trak_features"], rtol=1e-4, atol=1e-6)


# Columns besides the tokens.


def layoutlm() -> Any:
    from transformers import LayoutLMConfig, LayoutLMForSequenceClassification

    torch.manual_seed(0)
    config = LayoutLMConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=20,
        max_2d_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return LayoutLMForSequenceClassification(config).eval()


def test_boxes_reach_the_model_and_are_padded_with_the_tokens():
    model = layoutlm()
    task = AutoTask.from_model(model)
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    boxes = [[[i, i, i + 5, i + 9] for i in row] for row in ids]
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "bbox": boxes, "label": [0, 1, 2]})
    task.check(dataset, None)
    assert task.columns_read(dataset.features)["tokens"] == ["input_ids", "bbox"]
    batch = task.collate(dataset[:], None)
    output, _ = task.output_function(model, batch)
    for row in range(3):  # each row alone, without padding
        alone = model(input_ids=torch.tensor([ids[row]]), bbox=torch.tensor([boxes[row]])).logits[0].detach()
        p = alone.double().softmax(0)[row]
        assert output[row].item() == pytest.approx(float(torch.log(p / (1 - p))), rel=1e-4, abs=1e-5)
    padded = {
        "input_ids": [[0] * (5 - len(row)) + row for row in ids],
        "attention_mask": [[0] * (5 - len(row)) + [1] * len(row) for row in ids],
        "bbox": [[[0] * 4] * (5 - len(row)) + row for row in boxes],
    }
    from_left = task.collate({**padded, "label": [0, 1, 2]}, None)
    assert all(torch.equal(from_left[name], batch[name]) for name in batch)


def test_a_column_that_the_model_reads_and_no_batch_can_hold_is_refused_by_name():
    task = AutoTask.from_model(bert())
    rows = {"input_ids": [[5, 6], [7]], "label": [0, 1]}
    for position_ids, message in (
        ([[0], [0]], None),
        ([[0], [0, 1, 2]], "'position_ids', which has neither"),
        ([[0, 1], None], "row 1"),
    ):
        dataset = datasets.Dataset.from_dict({**rows, "position_ids": position_ids})
        if message is None:
            task.check(dataset, None)
        else:
            with pytest.raises(ValueError, match=message):
                task.check(dataset, None)
    with pytest.raises(ValueError, match="'inputs_embeds' has the name of an argument"):
        task.check(datasets.Dataset.from_dict({**rows, "inputs_embeds": [[0.0], [0.0]]}), None)


# Lengths.


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=22,
        num_labels=3, pad_token_id=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def test_texts_are_cut_at_the_positions_that_a_model_really_has(tokenizer: Any):
    model = roberta()
    task = AutoTask.from_model(model)
    assert tokenizer.model_max_length > 10**9
    batch = task.collate({"text": ["model " * 100], "label": [0]}, tokenizer)
    assert batch["input_ids"].shape == (1, 20)
    assert task.output_function(model, batch)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"max_length=21 \(--max_length\) is more than the 20 tokens"):
        AutoTask.from_model(model, TrakConfig(max_length=21))


def test_tokenized_rows_that_do_not_fit_are_named():
    task = AutoTask.from_model(roberta())
    ids = [[5] * 20, [5] * 21, [5], [5] * 30]
    dataset = datasets.Dataset.from_dict({"input_ids": ids, "label": [0, 1, 2, 0]})
    with pytest.raises(ValueError, match=r"2 of 4 rows are longer than the 20 tokens.*rows 1, 3\..*max_length=20"):
        task.check(dataset, None)
    masked = datasets.Dataset.from_dict({"input_ids": [[5] * 21], "attention_mask": [[0] + [1] * 20], "label": [0]})
    task.check(masked, None)
    empty = datasets.Dataset.from_dict({"input_ids": [[5], []], "attention_mask": [[1], []], "label": [0, 1]})
    with pytest.raises(ValueError, match=r"1 of 2 rows have no token but padding: row 1"):
        task.check(empty, None)


# Images.


def files(folder: Path) -> list[str]:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    names = [str(folder / f"{i}.png") for i in range(6)]
    for name, array in zip(names, arrays(), strict=True):
        Image.fromarray(array).save(name)
    return names


def as_bytes(array: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("make", ["files", "bytes", "dicts", "lists", "channels first", "undecoded", "array3d"])
def test_images_of_every_make_give_the_pixels_of_decoded_ones(make: str, tmp_path: Path, image_processor: Any):
    labels = [0, 1, 2, 0, 1, 2]
    expected = AutoTask.from_model(vit()).collate(pictures()[:], image_processor)["pixel_values"]
    if make == "undecoded":
        dataset = pictures().cast_column("img", datasets.Image(decode=False))
    elif make == "array3d":
        features = datasets.Features({"img": datasets.Array3D((9, 7, 3), "uint8"), "label": datasets.Value("int64")})
        dataset = datasets.Dataset.from_dict({"img": arrays(), "label": labels}, features=features)
    else:
        cells: Any = {
            "files": lambda: files(tmp_path / "images"),
            "bytes": lambda: [as_bytes(array) for array in arrays()],
            "dicts": lambda: [{"bytes": as_bytes(array), "path": None} for array in arrays()],
            "lists": lambda: arrays().tolist(),
            "channels first": lambda: arrays().transpose(0, 3, 1, 2).tolist(),
        }[make]()
        dataset = datasets.Dataset.from_dict({"img": cells, "label": labels})
    task = AutoTask.from_model(vit()).reading(dataset)
    task.check(dataset, image_processor)
    assert torch.equal(task.collate(dataset[:], image_processor)["pixel_values"], expected)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["https://example.org/a.png", "http://example.org/b.png"], r"2 rows of 'image' hold addresses.*rows 0, 1.*download"),
        (["/none/a.png", "/none/b.png"], r"image files of 2 rows are not there: rows 0, 1; the first is /none/a\.png"),
        ([None, "/none/b.png"], r"1 rows have no image in 'image': row 0"),
        ([b"no image", b"either"], r"in row 0, it cannot be read as an image"),
        ([[[300, 0], [0, 0]], [[0, 0], [0, 0]]], r"values from 0 to 300; expected 0 to 255"),
        ([[[0.5, 0.0], [0.0, 0.0]]] * 2, r"array of float64 of shape \(2, 2\); expected whole numbers.*'pixel_values'"),
    ],
)
def test_cells_that_are_no_images_are_refused_before_any_work(cells: list, message: str, image_processor: Any):
    dataset = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]})
    with pytest.raises(ValueError, match=message):
        AutoTask.from_model(vit()).check(dataset, image_processor)


@pytest.mark.parametrize("limit", ["512", 0, -1, 2.5, True, float("nan")])
def test_a_tokenizers_limit_that_is_no_number_of_tokens_is_refused(limit: Any):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = limit
    dataset = datasets.Dataset.from_dict({"text": ["a b"], "label": [0]})
    with pytest.raises(ValueError, match="model_max_length is .*at least 1, is expected"):
        AutoTask.from_model(bert()).collate(dataset[:], tokenizer)


def test_an_image_far_too_large_is_named_by_its_row(monkeypatch):
    dataset = pictures()
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"Row 1 of the dataset cannot be read: Image size .* exceeds limit.*filter such rows"):
        read_rows(dataset, [1, 2])


def test_a_missing_first_image_is_named(image_processor: Any):
    dataset = datasets.concatenate_datasets(
        [
            datasets.Dataset.from_dict({"img": [None], "label": [0]}, features=pictures().features),
            pictures(),
        ]
    )
    with pytest.raises(ValueError, match=r"1 rows have no image in 'img': row 0\."):
        AutoTask.from_model(vit()).check(dataset, image_processor)
    with pytest.raises(ValueError, match=r"image in 'img' of row 0 of this batch cannot serve: it is missing"):
        ImageInputs(None, "RGB").collate(dataset[:3], image_processor)


@pytest.mark.parametrize("channels", [1, 3])
def test_deep_greys_are_scaled_and_not_clipped(channels: int):
    from PIL import Image
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    deep = np.linspace(0, 65535, 40).astype(np.uint16)
    images = [Image.fromarray(np.full((8, 8), value, dtype=np.uint16)) for value in deep]
    batch = AutoTask.from_model(vit(num_channels=channels)).collate({"image": images, "label": [0] * 40}, processor)
    found = batch["pixel_values"][:, 0, 0, 0]
    np.testing.assert_allclose(found.numpy(), deep / 65535 * 2 - 1, atol=1 / 255)
    assert len(found.unique()) == 40


def test_columns_of_images_are_found_by_type_and_then_by_name():
    features = datasets.Features({"photo_id": datasets.Value("string"), "image": datasets.Value("binary")})
    assert find_image_columns(features) == ["image"]
    features = datasets.Features({"image": datasets.Value("string"), "x": datasets.Image()})
    assert find_image_columns(features) == ["x"]
    check_pictures(pictures(), "img")


@pytest.mark.parametrize("make", [convnext, resnet, vit])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pixels_have_the_dtype_of_the_model(make: Any, dtype: torch.dtype, image_processor: Any):
    model = make().to(dtype).eval()
    task = AutoTask.from_model(model)
    batch = task.collate(pictures()[:], image_processor)
    assert batch["pixel_values"].dtype == dtype
    assert task.output_function(model, batch)[0].isfinite().all()
    prepared = {"pixel_values": batch["pixel_values"].float().tolist(), "label": [0] * 6}
    assert torch.equal(task.collate(prepared, None)["pixel_values"], batch["pixel_values"])


def siglip2_classifier() -> Any:
    from transformers import Siglip2Config, Siglip2ForImageClassification

    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_patches": 16,
        "patch_size": 4,
    }
    torch.manual_seed(0)
    return Siglip2ForImageClassification(Siglip2Config(vision_config=vision, num_labels=3)).eval()


def test_all_that_the_image_processor_makes_and_the_model_takes_is_passed_on():
    from transformers import Siglip2ImageProcessor

    model = siglip2_classifier()
    task = AutoTask.from_model(model)
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    batch = task.collate(pictures()[:], processor)
    assert {"pixel_values", "pixel_attention_mask", "spatial_shapes"} <= set(batch)
    output, _ = task.output_function(model, batch)
    assert output.shape == (6,)
    prepared = {name: values.tolist() for name, values in batch.items() if name != "labels"}
    again = task.collate({**prepared, "label": pictures()["label"][:]}, None)
    assert all(torch.equal(again[name], batch[name]) for name in batch)


# What 1 - p means does not depend on a name.


def test_the_name_of_a_task_of_ones_own_changes_no_score(tmp_path: Path):
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("x", "y")}

    def prediction(model: Any, batch: Any) -> torch.Tensor:
        return model(batch["x"]).squeeze(1)

    def residual(model: Any, batch: Any) -> torch.Tensor:
        return batch["y"] - model(batch["x"]).squeeze(1)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    dataset = datasets.Dataset.from_dict({"x": x, "y": (x @ [1.0, -1.0, 0.5] + rng.normal(size=40)).astype(np.float32)})
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    scores = {}
    for name in (None, "my-prices", "price-classification", "prices-regression"):
        task = Task.custom(prediction, collator=collate, out_to_loss=residual, name=name)
        index = AttributionIndex.build(
            tmp_path / str(name), models=model, dataset=dataset, task=task, progress=False,
            config=TrakConfig(projector="identity", proj_dim=4),
        )  # fmt: skip
        assert index.members[0].identity["out_to_loss_kind"] == "other"
        scores[name] = index.score(dataset, damping=0.0, progress=False)
        with pytest.raises(ValueError, match="of the kind 'other'"):
            index.score(dataset, residual_weighting=True, progress=False)
    phi = np.concatenate([x, np.ones((40, 1))], 1).astype(np.float64)
    with torch.no_grad():
        q = np.asarray(dataset["y"][:]) - model(torch.from_numpy(x)).squeeze(1).numpy()
    expected = phi @ np.linalg.solve(phi.T @ phi, phi.T) * q[:, None]
    for found in scores.values():
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_kind_may_be_stated_and_a_name_of_the_library_may_not():
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {}

    make = {"output": lambda m, b: b, "collator": collate}
    assert Task.custom(**make).out_to_loss_kind == "one"
    stated = Task.custom(**make, out_to_loss=lambda m, b: b, out_to_loss_kind="one_minus_p")
    assert stated.out_to_loss_kind == "one_minus_p"
    with pytest.raises(ValueError, match="must be one of one_minus_p"):
        Task.custom(**make, out_to_loss=lambda m, b: b, out_to_loss_kind="half")
    with pytest.raises(ValueError, match="is of the kind 'one', but"):
        Task.custom(**make, out_to_loss_kind="one_minus_p")
    with pytest.raises(ValueError, match="'causal-lm' is the name of a task of this library"):
        Task.custom(**make, name="causal-lm")


def test_the_tasks_of_the_library_state_what_out_to_loss_is():
    from hf_trak.tasks import TASKS
    from hf_trak.tasks.base import BUILT_IN_TASKS

    assert set(BUILT_IN_TASKS) == set(TASKS)
    assert AutoTask.from_model(bert()).out_to_loss_kind == "one_minus_p"
    assert AutoTask.from_model(bert(num_labels=1)).out_to_loss_kind == "residual"
    assert AutoTask.from_model(vit(problem_type="multi_label_classification")).out_to_loss_kind == "mean_one_minus_p"


# Features of several labels, and of translated ones.


@pytest.mark.parametrize("make", [bert, vit])
def test_features_of_several_labels_are_those_of_a_float64_loop(make: Any):
    torch.manual_seed(0)
    model = make(num_labels=4, problem_type="multi_label_classification").eval()
    task = AutoTask.from_model(model)
    labels = [[1, 0, 0, 1], [0, 0, 0, 0], [1.0, 1.0, 1.0, 1.0]]
    inputs: dict[str, list] = (
        {"input_ids": [[5, 6, 7], [8], [9, 10, 11, 12]]}
        if make is bert
        else {"pixel_values": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).tolist()}
    )
    dataset = datasets.Dataset.from_dict({**inputs, "labels": [list(map(float, row)) for row in labels]})
    size = sum(parameter.numel() for parameter in model.parameters())
    featurizer = Featurizer(model, TrakConfig(projector="identity", proj_dim=size), None)
    task.check(dataset, None)
    found = featurizer.compute(featurizer.collate(dataset[:]))
    wide = make(num_labels=4, problem_type="multi_label_classification").eval()
    wide.load_state_dict(model.state_dict())
    wide.double()
    name = next(iter(inputs))
    for row in range(3):
        value = torch.tensor([inputs[name][row]])
        logits = wide(**{name: value.double() if value.is_floating_point() else value}).logits[0]
        p = logits.sigmoid()
        right = torch.where(torch.tensor(labels[row]) == 1, p, 1 - p)
        output = (right / (1 - right)).log().sum()
        grads = torch.cat([grad.flatten() for grad in torch.autograd.grad(output, list(wide.parameters()))])
        scale = float(grads.norm())
        np.testing.assert_allclose(found.features[row].double().numpy(), grads.numpy(), atol=1e-5 * scale)
        assert found.output[row].item() == pytest.approx(output.item(), rel=1e-4, abs=1e-5)
        assert found.out_to_loss[row].item() == pytest.approx((1 - right).mean().item(), rel=1e-4)


def test_labels_translated_by_name_give_the_features_of_the_models_own_numbers(tmp_path: Path, tokenizer: Any):
    ids = {"high": 0, "low": 1, "mid": 2}
    model = bert(num_labels=3, id2label={id: name for name, id in ids.items()}, label2id=ids)
    names = datasets.ClassLabel(names=["low", "mid", "high"])
    theirs = texts().cast_column("label", names)
    own = datasets.Dataset.from_dict({"text": SENTENCES, "label": [1, 2, 0] * 2})
    with pytest.raises(ValueError, match="another order"):
        build(tmp_path / "refused", model, theirs, tokenizer)
    assert not (tmp_path / "refused").exists()
    found = build(tmp_path / "theirs", model, theirs, tokenizer, label_mapping="by_name")
    expected = build(tmp_path / "own", model, own, tokenizer)
    np.testing.assert_array_equal(found.features()["trak_features"], expected.features()["trak_features"])
    np.testing.assert_array_equal(found.score(theirs, progress=False), expected.score(own, progress=False))
    assert TrakConfig.from_pretrained(tmp_path / "theirs").label_mapping == "by_name"
    words = datasets.Dataset.from_dict({"text": SENTENCES, "label": ["low", "mid", "high"] * 2})
    np.testing.assert_array_equal(
        build(tmp_path / "words", model, words, tokenizer).features()["trak_features"],
        expected.features()["trak_features"],
    )


def test_a_wrong_label_behind_a_transform_is_named_with_its_row(tmp_path: Path, tokenizer: Any):
    def tokenize(rows: dict[str, list]) -> dict[str, Any]:
        return {**tokenizer(rows["text"]), "labels": [9 if text == "do this" else 0 for text in rows["text"]]}

    with pytest.raises(ValueError, match=r"9 in row \d.*batch are the dataset's rows [\d, ]*1\b"):
        build(tmp_path / "index", bert(), texts().with_transform(tokenize))


@pytest.mark.parametrize("make", [convnext, resnet])
def test_convolutions_in_bfloat16_are_featurized_from_rows(make: Any, tmp_path: Path, image_processor: Any):
    torch.manual_seed(0)
    wide = make()
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    found, expected = (
        np.array(build(tmp_path / str(number), model, pictures(), image_processor).features()["trak_output"][:])
        for number, model in enumerate((narrow, wide))
    )
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05)
    assert not np.array_equal(found, expected)


def test_labels_that_change_between_readings_are_refused(tokenizer: Any):
    rng = np.random.default_rng(0)

    def relabel(rows: dict[str, list]) -> dict[str, Any]:
        return {**tokenizer(rows["text"]), "labels": rng.integers(0, 3, len(rows["text"])).tolist()}

    with pytest.raises(ValueError, match=r"not the same twice.*'labels'"):
        AutoTask.from_model(bert()).check(texts().with_transform(relabel), None)


def test_a_processor_of_the_wrong_kind_reads_no_rows():
    """An image processor would take a text for the name of a picture."""
    from transformers import ViTImageProcessor

    from hf_trak.messages import MissingProcessor
    from hf_trak.tasks.inputs import need_tokenizer

    for processor in (None, ViTImageProcessor()):
        with pytest.raises(MissingProcessor, match="need a tokenizer"):
            need_tokenizer(processor)
    need_tokenizer(word_tokenizer())
