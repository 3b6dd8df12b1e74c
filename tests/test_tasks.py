from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import N_CLASSES, PAD, albert, bert, distilbert, gpt2, llama, make_batch, make_model, resnet, vit
from torch import Tensor, nn

from hf_trak.config import TrakConfig
from hf_trak.gradients import layerwise_features, select_parameters
from hf_trak.projectors import Identity
from hf_trak.tasks import TASKS, AutoTask, ImageInputs, Task, TextInputs, classification_margin, margin, regression_prediction

WORDS = ["which", "example", "made", "my", "model", "do", "this", "and", "that", "one"]


def logits_model(logits: Tensor) -> Any:
    return lambda **inputs: SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": PAD, "[UNK]": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


# Outputs.


def test_the_margin_is_the_log_odds_of_the_label():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 7, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 7, (50,), generator=generator)
    p = np.exp(logits.numpy())[np.arange(50), labels] / np.exp(logits.numpy()).sum(1)
    output, out_to_loss = classification_margin(logits_model(logits), {"labels": labels})
    np.testing.assert_allclose(margin(logits, labels).numpy(), np.log(p / (1 - p)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(output.numpy(), np.log(p / (1 - p)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out_to_loss.numpy(), 1 - p, rtol=1e-12, atol=1e-12)
    assert output.isfinite().all()
    assert out_to_loss.isfinite().all()


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_margins_and_their_gradients_are_finite_at_extreme_logits(size: float):
    logits = torch.tensor([[size, 0.0, -size], [size, 0.0, -size]], requires_grad=True)
    output, out_to_loss = classification_margin(logits_model(logits), {"labels": torch.tensor([0, 2])})
    grads = torch.autograd.grad(output.sum(), logits)[0]
    assert torch.isfinite(output).all()
    assert output.tolist() == pytest.approx([size, -2 * size], rel=1e-6)
    torch.testing.assert_close(grads, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]]), rtol=0, atol=1e-20)
    assert out_to_loss.tolist() == pytest.approx([np.exp(-size), 1.0], rel=1e-5)


def test_out_to_loss_does_not_round_to_zero_where_the_probability_rounds_to_one():
    _, out_to_loss = classification_margin(logits_model(torch.tensor([[40.0, 0.0]])), {"labels": torch.tensor([0])})
    assert out_to_loss.item() == pytest.approx(np.exp(-40.0), rel=1e-5)


def test_half_precision_logits_are_read_in_float32_and_float64_ones_stay():
    labels = torch.tensor([1])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        for function in (classification_margin, regression_prediction):
            logits = torch.tensor([[1.0, 2.5]] if function is classification_margin else [[1.5]], dtype=dtype)
            output, out_to_loss = function(logits_model(logits), {"labels": labels})
            assert output.dtype == out_to_loss.dtype == expected
    half, _ = classification_margin(logits_model(torch.tensor([[1.0, 2.5, 2.0]]).bfloat16()), {"labels": labels})
    assert half.item() == pytest.approx(2.5 - np.log(np.exp(1) + np.exp(2)), rel=1e-6)


def test_out_to_loss_is_minus_the_derivative_of_the_loss():
    """Of cross-entropy in the margin; and of half the squared error in the prediction."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 4, (6,), generator=generator)
    output, out_to_loss = classification_margin(logits_model(logits), {"labels": labels})
    output.requires_grad_()
    derivative = torch.autograd.grad(torch.nn.functional.softplus(-output).sum(), output)[0]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.nn.functional.softplus(-output), losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out_to_loss, -derivative, rtol=1e-12, atol=1e-12)
    prediction, residual = regression_prediction(logits_model(logits[:, :1]), {"labels": labels.double()})
    prediction.requires_grad_()
    derivative = torch.autograd.grad(((labels.double() - prediction) ** 2 / 2).sum(), prediction)[0]
    torch.testing.assert_close(residual, -derivative, rtol=1e-12, atol=1e-12)


def test_regression_gives_the_prediction_and_the_residual():
    output, out_to_loss = regression_prediction(
        logits_model(torch.tensor([[0.5], [2.0]], requires_grad=True)), {"labels": torch.tensor([1.0, -1.0])}
    )
    assert output.tolist() == [0.5, 2.0]
    assert out_to_loss.tolist() == [0.5, -3.0]
    assert output.requires_grad
    assert not out_to_loss.requires_grad


def test_labels_are_kept_from_the_model():
    """A model given labels computes its own loss over the batch, for nothing."""

    def model(**inputs: Any) -> Any:
        assert set(inputs) == {"input_ids"}
        return SimpleNamespace(logits=torch.zeros(2, 1))

    batch = {"input_ids": torch.zeros(2, 3), "labels": torch.tensor([0, 0])}
    regression_prediction(model, batch)
    classification_margin(model, batch)


# A task of one's own.


def collate_vectors(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.tensor([row["x"] for row in rows]), "y": torch.tensor([row["y"] for row in rows])}


def squared_error(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]).squeeze(1) - batch["y"]).square()


def test_a_custom_task_collates_rows_and_hands_both_outputs_on():
    torch.manual_seed(0)
    model, rows = nn.Linear(2, 1), {"x": [[1.0, 2.0], [3.0, 4.0]], "y": [0.0, 1.0]}
    task = Task.custom(squared_error, collator=collate_vectors)
    task.check(datasets.Dataset.from_dict(rows), None)
    batch = task.collate(rows, None)
    assert torch.equal(batch["x"], torch.tensor(rows["x"]))
    assert "labels" not in batch
    output, out_to_loss = task.output_function(model, batch)
    assert torch.equal(output, squared_error(model, batch))
    assert out_to_loss.tolist() == [1.0, 1.0]
    assert not out_to_loss.requires_grad
    assert task.name == "custom:squared_error"
    result = layerwise_features(
        model,
        batch,
        output_function=task.output_function,
        parameters=dict(model.named_parameters()),
        projector=Identity(proj_dim=3, sizes={"weight": 2, "bias": 1}),
    )
    residual = 2 * (model(batch["x"]).squeeze(1) - batch["y"])
    torch.testing.assert_close(result.features, residual[:, None].detach() * torch.cat([batch["x"], torch.ones(2, 1)], 1))


def test_a_custom_out_to_loss_is_not_differentiated():
    task = Task.custom(squared_error, collator=collate_vectors, out_to_loss=lambda m, b: 2 * squared_error(m, b), name="mine")
    batch = task.collate({"x": [[1.0, 2.0]], "y": [0.0]}, None)
    output, out_to_loss = task.output_function(nn.Linear(2, 1), batch)
    assert task.name == "mine"
    assert output.requires_grad
    assert not out_to_loss.requires_grad
    assert torch.equal(out_to_loss, 2 * output.detach())


def test_an_out_to_loss_by_another_name_than_one_is_refused():
    with pytest.raises(ValueError, match="must be a callable or 'one', but is 'two'"):
        Task.custom(squared_error, collator=collate_vectors, out_to_loss="two")


# Text.


def text_inputs(**options: Any) -> TextInputs:
    accepted = frozenset({"input_ids", "attention_mask", "token_type_ids"})
    return TextInputs(**{"text_columns": None, "max_length": None, "accepted": accepted, "pad_token_id": PAD, **options})


def padded_rows(padding: str | None, width: int) -> dict[str, list[list[int]]]:
    sentences = [[5, 6, 7, 8], [9], [10, 11, 12]]
    types = [[0, 0, 1, 1], [1], [0, 1, 1]]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    for ids, kinds in zip(sentences, types, strict=True):
        fill = [0] * (0 if padding is None else width - len(ids))
        for key, values in (("input_ids", ids), ("attention_mask", [1] * len(ids)), ("token_type_ids", kinds)):
            rows[key].append(fill + values if padding == "left" else values + fill)
    return rows


@pytest.mark.parametrize(("padding", "width"), [("left", 4), ("left", 9), ("right", 4), ("right", 9)])
def test_padding_of_tokenized_rows_is_put_on_the_right_and_no_wider_than_needed(padding: str, width: int):
    expected = text_inputs().collate(padded_rows(None, 0), None)
    assert expected["input_ids"].tolist() == [[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 0]]
    assert expected["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert expected["token_type_ids"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]]
    rows = padded_rows(padding, width)
    for container in (rows, {key: torch.tensor(values) for key, values in rows.items()}):
        batch = text_inputs().collate(container, None)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert all(values.dtype == torch.int64 for values in batch.values())


def test_rows_without_a_mask_are_taken_whole_and_get_one():
    batch = text_inputs().collate({"input_ids": [[5, 6], [7]], "label": [0, 1], "text": ["a", "b"]}, None)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_only_what_the_models_forward_takes_reaches_it():
    rows = {**padded_rows(None, 0), "idx": [[0] * 4, [1], [2] * 3], "labels": [0, 1, 2]}
    assert set(text_inputs(accepted=frozenset({"input_ids"})).collate(rows, None)) == {"input_ids"}
    inputs = AutoTask.from_model(distilbert()).inputs
    assert set(inputs.collate(rows, None)) == {"input_ids", "attention_mask"}


def test_the_pad_token_is_the_models():
    batch = text_inputs(pad_token_id=42).collate({"input_ids": [[5, 6], [7]]}, None)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 42]]
    assert AutoTask.from_model(bert(pad_token_id=3)).inputs.pad_token_id == 3


def test_texts_and_their_tokens_give_the_same_batch(tokenizer):
    texts = ["which example made my model do this", "that one", "and strange"]
    inputs = text_inputs()
    from_texts = inputs.collate({"text": texts, "label": [0, 1, 0]}, tokenizer)
    for side in ("left", "right"):
        tokens = tokenizer(texts, padding="max_length", max_length=12, padding_side=side)
        from_tokens = inputs.collate(dict(tokens), None)
        assert all(torch.equal(from_texts[key], from_tokens[key]) for key in from_texts)
    assert from_texts["input_ids"].shape == (3, 7)
    assert from_texts["input_ids"][2].tolist() == [9, 1, 0, 0, 0, 0, 0]


def test_two_texts_are_a_pair_in_the_order_asked_for(tokenizer):
    rows = {"sentence": ["that one"], "question": ["which model"]}
    dataset = datasets.Dataset.from_dict(rows)
    found, asked = text_inputs(), text_inputs(text_columns=("sentence", "question"))
    for inputs in (found, asked):
        inputs.check(dataset.features, tokenizer)
    # QNLI's order, whatever the order of the columns.
    assert found.collate(rows, tokenizer)["input_ids"].tolist() == [[2, 6, 10, 11]]
    assert asked.collate(rows, tokenizer)["input_ids"].tolist() == [[10, 11, 2, 6]]


def test_text_columns_asked_for_win_over_tokens(tokenizer):
    rows = {"input_ids": [[3, 3, 3]], "text": ["which model"]}
    assert text_inputs(text_columns=("text",)).collate(rows, tokenizer)["input_ids"].tolist() == [[2, 6]]


def test_texts_are_cut_at_max_length_or_the_models_positions(tokenizer):
    rows = {"text": ["one " * 100]}
    assert text_inputs(max_length=5).collate(rows, tokenizer)["input_ids"].shape == (1, 5)
    assert AutoTask.from_model(bert()).inputs.collate(rows, tokenizer)["input_ids"].shape == (1, 20)
    assert AutoTask.from_model(bert(), TrakConfig(max_length=7)).inputs.collate(rows, tokenizer)["input_ids"].shape == (1, 7)
    assert text_inputs().collate(rows, tokenizer)["input_ids"].shape == (1, 100)


def test_lengths_grow_with_the_cost_of_a_row():
    inputs = text_inputs()
    for padding in ("left", "right"):
        assert inputs.lengths(datasets.Dataset.from_dict(padded_rows(padding, 9))) == [4, 1, 3]
    assert inputs.lengths(datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]})) == [2, 1]
    assert inputs.lengths(datasets.Dataset.from_dict({"sentence1": ["xx", "y"], "sentence2": ["zzz", ""]})) == [5, 1]
    assert ImageInputs(None, "RGB").lengths(datasets.Dataset.from_dict({"pixel_values": [[1.0]]})) is None


@pytest.mark.parametrize(
    ("columns", "options", "with_tokenizer", "message"),
    [
        (
            {"a": ["x"], "b": ["x"], "c": ["x"]},
            {},
            True,
            r"ambiguous: 'a', 'b', 'c' may.*--text_columns a b",
        ),
        ({"a": [1]}, {}, True, r"tokenized rows \('input_ids'\) or one or two text columns, but the dataset has a"),
        ({"a": ["x"]}, {}, False, "Text columns need a tokenizer: pass it as `processing_class`"),
        ({"a": ["x"]}, {"text_columns": ("b", "a", "c")}, True, "no column 'b', 'c'; it has a"),
        ({"a": [1]}, {"text_columns": ("a",)}, True, r"The text column 'a' holds .*int64.*, not strings"),
    ],
)
def test_a_dataset_whose_text_cannot_be_found_is_refused(columns, options, with_tokenizer, message, tokenizer):
    features = datasets.Dataset.from_dict(columns).features
    with pytest.raises(ValueError, match=message):
        text_inputs(**options).check(features, tokenizer if with_tokenizer else None)


def test_tokenized_rows_need_no_tokenizer():
    text_inputs().check(datasets.Dataset.from_dict({"input_ids": [[1]], "a": ["x"], "b": ["x"], "c": ["x"]}).features, None)


# Images.


def pictures(mode: str) -> list[Any]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 4), dtype=np.uint8)
    return [Image.fromarray(array).convert(mode) for array in pixels]


@pytest.fixture(scope="module")
def image_processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 8, "width": 8})


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1", "LA"])
def test_pictures_of_every_mode_become_three_channels(mode: str, image_processor):
    images = pictures(mode)
    batch = ImageInputs(None, "RGB").collate({"label": [0, 1], "img": images}, image_processor)
    assert set(batch) == {"pixel_values"}
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    expected = image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["pixel_values"].isfinite().all()


def test_grey_and_coloured_pictures_share_a_batch(image_processor):
    mixed = [pictures("L")[0], pictures("RGBA")[1]]
    batch = ImageInputs("photo", "RGB").collate({"photo": mixed}, image_processor)
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    grey = batch["pixel_values"][0]
    assert torch.equal(grey[0], grey[1])
    assert not torch.equal(batch["pixel_values"][1, 0], batch["pixel_values"][1, 1])


def test_a_model_of_one_channel_gets_grey_pictures():
    assert AutoTask.from_model(vit(num_channels=1)).inputs.mode == "L"
    assert AutoTask.from_model(vit()).inputs.mode == "RGB"


def test_rows_that_hold_pixel_values_are_stacked():
    pixels = torch.randn(2, 3, 4, 4)
    for rows in (pixels, pixels.tolist(), list(pixels.numpy())):
        batch = ImageInputs(None, "RGB").collate({"pixel_values": rows, "label": [0, 1]}, None)
        assert torch.equal(batch["pixel_values"], pixels)


def test_pixels_as_a_file_holds_them_are_not_taken_for_prepared_ones():
    with pytest.raises(ValueError, match="'pixel_values' holds whole numbers from 0 to 255.*image processor"):
        ImageInputs(None, "RGB").collate({"pixel_values": [[[[0, 255], [7, 8]]]], "label": [0]}, None)


def image_features(*names: str) -> datasets.Features:
    return datasets.Features({**{name: datasets.Image() for name in names}, "label": datasets.Value("int64")})


@pytest.mark.parametrize(
    ("names", "column", "message"),
    [
        ((), None, r"'pixel_values' or one image column, but the dataset has label\. Set `image_column`"),
        (("a", "b"), None, r"one image column, but the dataset has a, b, label"),
        (("a",), "b", "no column 'b'; it has a, label"),
    ],
)
def test_a_dataset_whose_image_cannot_be_found_is_refused(names, column, message, image_processor):
    with pytest.raises(ValueError, match=message):
        ImageInputs(column, "RGB").check(image_features(*names), image_processor)


def test_an_image_column_without_a_processor_is_refused(image_processor):
    ImageInputs(None, "RGB").check(image_features("a"), image_processor)
    ImageInputs("b", "RGB").check(image_features("a", "b"), image_processor)
    with pytest.raises(ValueError, match="An image column needs an image processor: pass it as `processing_class`"):
        ImageInputs(None, "RGB").check(image_features("a"), None)


# AutoTask.


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (bert, "text-classification"),
        (distilbert, "text-classification"),
        (albert, "text-classification"),
        (gpt2, "text-classification"),
        (llama, "text-classification"),
        (vit, "image-classification"),
        (resnet, "image-classification"),
        (lambda: bert(num_labels=1), "text-regression"),
        (lambda: vit(num_labels=1), "image-regression"),
    ],
)
def test_the_task_follows_from_the_architecture_and_its_labels(model, name: str):
    made = model()
    automatic = AutoTask.from_model(made)
    assert automatic.name == name
    assert automatic.n_classes == (N_CLASSES if name.endswith("classification") else None)
    assert automatic.output_function is (classification_margin if name.endswith("classification") else regression_prediction)
    assert isinstance(automatic.inputs, TextInputs if name.startswith("text") else ImageInputs)
    assert AutoTask.from_model(made, TrakConfig(task=name)) == automatic


def test_the_configuration_reaches_the_task():
    config = TrakConfig(text_columns=("a", "b"), max_length=9, label_column="gold")
    task = AutoTask.from_model(bert(), config)
    assert (task.inputs.text_columns, task.inputs.max_length, task.label_column) == (("a", "b"), 9, "gold")
    assert AutoTask.from_model(vit(), TrakConfig(image_column="photo")).inputs.image_column == "photo"


def test_an_unknown_task_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=f"Unknown task 'translation'; choose one of {', '.join(TASKS)}, or auto.*Task.custom"):
        AutoTask.from_model(bert(), TrakConfig(task="translation"))


@pytest.mark.parametrize("task", ["auto", "text-classification"])
def test_an_architecture_that_is_not_served_is_answered_with_those_that_are(task: str):
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=4, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4, vocab_size=9))
    with pytest.raises(
        ValueError, match=r"No task serves BertModel yet.*text-classification, .*semantic-segmentation.*Task\.custom"
    ):
        AutoTask.from_model(model, TrakConfig(task=task))


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (
            bert,
            "image-classification",
            "BertForSequenceClassification with 3 labels serves text-classification, not image-class",
        ),
        (
            bert,
            "text-regression",
            "BertForSequenceClassification with 3 labels serves text-classification, not text-regression",
        ),
        (lambda: vit(num_labels=1), "image-classification", "1 labels serves image-regression, not image-classification"),
    ],
)
def test_a_task_that_does_not_fit_the_model_is_refused(model, task: str, message: str):
    with pytest.raises(ValueError, match=message):
        AutoTask.from_model(model(), TrakConfig(task=task))


def test_a_regression_on_several_numbers_is_not_taken_for_a_classification():
    with pytest.raises(ValueError, match="regression"):
        AutoTask.from_model(bert(problem_type="regression", num_labels=2))


# Labels.


def check_labels(column: str, values: list[Any], **options: Any) -> None:
    model = bert(**options)
    rows = {"input_ids": [[5, 6]] * len(values), column: values}
    AutoTask.from_model(model).check(datasets.Dataset.from_dict(rows), None)


@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_are_found_by_either_name_and_collated_as_labels(column: str):
    check_labels(column, [0, 2, 1])
    task = AutoTask.from_model(bert())
    batch = task.collate({"input_ids": [[5], [6]], column: [2, 0]}, None)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64


def test_the_label_column_asked_for_is_the_one_read():
    task = AutoTask.from_model(bert(), TrakConfig(label_column="gold"))
    rows = {"input_ids": [[5]], "label": [99], "gold": [1]}
    task.check(datasets.Dataset.from_dict(rows), None)
    assert task.collate(rows, None)["labels"].tolist() == [1]


def test_numbers_to_predict_become_float32():
    for values in ([1, 2], [0.5, 2.5], [True, False]):
        check_labels("label", values, num_labels=1)
        batch = AutoTask.from_model(bert(num_labels=1)).collate({"input_ids": [[5], [6]], "label": values}, None)
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].tolist() == [float(value) for value in values]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "target",
            [0, 1],
            r"text-classification needs a label column, 'labels' or 'label', but the dataset has input_ids, target",
        ),
        ("label", [0, 1, 3, 5], r"lie in 0 to 2, the model's 3 classes, but 2 of 4 do not: 3 in rows 2, 3\. Filter"),
        ("label", [0, -1], r"1 of 2 do not: -1 in row 1 \(-1 marks an unlabelled test split\)\. Filter these rows"),
        ("label", [0.5, 1.0], r"one class index per example, but 1 of 2 labels are not whole: 0\.5 in row 0.*num_labels=1"),
        ("label", [[0, 1], [1, 0]], r"one class index per example, but the first label is \[0, 1\]"),
        ("label", ["yes", "no"], r"Labels are strings, such as 'yes', and the model has no names.*`model\.config\.label2id`"),
    ],
)
def test_labels_that_cannot_serve_are_refused(column: str, values: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        check_labels(column, values)


def test_a_missing_label_column_of_ones_own_is_named():
    task = AutoTask.from_model(bert(), TrakConfig(label_column="gold"))
    with pytest.raises(
        ValueError, match=r"needs a label column, 'gold', but the dataset has input_ids, label\. Set `label_column`"
    ):
        task.check(datasets.Dataset.from_dict({"input_ids": [[5]], "label": [0]}), None)


@pytest.mark.parametrize("values", [[0.5, float("nan")], [float("inf"), 1.0], [1.0, None]])
def test_numbers_to_predict_that_are_missing_or_not_finite_are_refused(values: list[Any]):
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        check_labels("label", values, num_labels=1)


def test_several_numbers_to_predict_per_example_are_refused():
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        check_labels("label", [[0.5, 1.0], [1.0, 2.0]], num_labels=1)


# From rows to outputs.


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "gpt2", "llama", "vit", "resnet"])
def test_a_collated_batch_runs_through_its_model(name: str):
    model = make_model(name).eval()
    rows = make_batch(name, n_rows=3)
    task = AutoTask.from_model(model)
    batch = task.collate({**{key: value.tolist() for key, value in rows.items() if key != "labels"}, "label": [0, 1, 2]}, None)
    assert set(batch) - {"labels"} <= set(inspect.signature(model.forward).parameters)
    output, out_to_loss = task.output_function(model, batch)
    assert output.shape == out_to_loss.shape == (3,)
    assert output.isfinite().all()
    assert ((out_to_loss > 0) & (out_to_loss < 1)).all()


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "gpt2", "llama"])
def test_features_do_not_depend_on_the_padding_of_tokenized_rows(name: str):
    model = make_model(name)
    parameters = select_parameters(model).parameters
    task = AutoTask.from_model(model)
    sentences = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    fills = [[PAD] * (8 - len(ids)) for ids in sentences]
    masks = [[1] * len(ids) for ids in sentences]
    none = [[0] * len(fill) for fill in fills]
    layouts = {
        "unpadded": {"input_ids": sentences},
        "right": {"input_ids": add(sentences, fills), "attention_mask": add(masks, none)},
        "left": {"input_ids": add(fills, sentences), "attention_mask": add(none, masks)},
    }
    features = {}
    for padding, rows in layouts.items():
        features[padding] = layerwise_features(
            model,
            task.collate({**rows, "labels": [0, 1, 2]}, None),
            output_function=task.output_function,
            parameters=parameters,
            projector=Identity(
                proj_dim=sum(parameter.numel() for parameter in parameters.values()),
                sizes={key: parameter.numel() for key, parameter in parameters.items()},
            ),
        ).features
    assert features["unpadded"].isfinite().all()
    assert (features["unpadded"].norm(dim=1) > 0).all()
    assert torch.equal(features["right"], features["unpadded"])
    assert torch.equal(features["left"], features["unpadded"])


def add(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    return [a + b for a, b in zip(left, right, strict=True)]


# Which columns are read.


def test_a_task_says_which_columns_it_reads(tokenizer):
    text = AutoTask.from_model(bert())
    words = datasets.Dataset.from_dict({"sentence": ["x"], "label": [0]}).features
    assert text.columns_read(words) == {"text": ["sentence"], "label": "label"}
    tokens = datasets.Dataset.from_dict({"input_ids": [[5]], "attention_mask": [[1]], "labels": [0]}).features
    assert text.columns_read(tokens) == {"tokens": ["input_ids", "attention_mask"], "label": "labels"}
    assert AutoTask.from_model(vit()).columns_read(image_features("img")) == {"image": "img", "label": "label"}
    assert Task.custom(squared_error, collator=collate_vectors).columns_read(words) == {}
    assert AutoTask.from_model(make_model("gpt2 lm")).columns_read(tokens) == {
        "tokens": ["input_ids", "attention_mask"],
        "label": "labels",
    }
