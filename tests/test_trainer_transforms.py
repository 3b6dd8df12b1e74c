"""Rows that a function makes when they are read: they train, whatever columns that function reads, and are attributed."""

from functools import partial

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from datasets_for_tests import token_rows
from models import bert, make_model
from test_runs import OPTIONS, Steps, assert_equal_models, collate
from tokenizers_for_tests import word_tokenizer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_trak import AttributionArguments, AttributionTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TEXTS = Dataset.from_dict(
    {"sentence": ["a b", "c d e", "f", "g h i", "j a", "b b"], "idx": list(range(6)), "label": [0, 1, 2] * 2}
)
PIXELS = Dataset.from_dict({"raw": np.random.default_rng(0).normal(size=(6, 3, 8, 8)).tolist(), "label": [0, 1, 2] * 2})
TOKENIZER = word_tokenizer()


def tokenize(rows):
    # Of one width, since the shape of a batch decides what dropout draws.
    return {**TOKENIZER(rows["sentence"], padding="max_length", max_length=3), "labels": rows["label"]}


def pixels(rows):
    return {"pixel_values": [torch.tensor(row) for row in rows["raw"]], "label": rows["label"]}


def augmented(rows):
    return {"pixel_values": [torch.tensor(row) + 0.1 * torch.randn(()) for row in rows["raw"]], "label": rows["label"]}


def make_trainer(folder, model, train, **given):
    args = AttributionArguments(str(folder), **{**OPTIONS, "num_train_epochs": 1, "proj_dim": 16, **given.pop("options", {})})
    return AttributionTrainer(model=make_model(model), args=args, train_dataset=train, **given)


@pytest.mark.parametrize("keep", [False, True], ids=["default", "remove_unused_columns=False"])
@pytest.mark.parametrize("members", ["final", "subsets:2"])
def test_a_transform_that_tokenizes_trains_and_is_attributed_as_rows_tokenized_before(tmp_path, members, keep):
    given = {"processing_class": TOKENIZER}
    options = {"members": members, "damping": "0.1", **({"remove_unused_columns": False} if keep else {})}
    through = make_trainer(tmp_path / "through", "bert", TEXTS.with_transform(tokenize), options=options, **given)
    through.train()
    before = TEXTS.map(tokenize, batched=True, remove_columns=TEXTS.column_names)
    mapped = make_trainer(tmp_path / "mapped", "bert", before, options={"members": members, "damping": "0.1"}, **given)
    mapped.train()
    assert_equal_models(through.model, mapped.model)
    scores = through.featurize().score(TEXTS.with_transform(tokenize), progress=False)
    np.testing.assert_allclose(scores, mapped.featurize().score(before, progress=False), rtol=1e-4, atol=1e-6)


def test_a_transform_that_makes_pixels_trains_and_is_attributed(tmp_path):
    trainer = make_trainer(tmp_path, "vit", PIXELS.with_transform(pixels))
    trainer.train()
    scores = trainer.featurize().score(PIXELS.with_transform(pixels), progress=False)
    before = PIXELS.map(pixels, batched=True, remove_columns=["raw"])
    mapped = make_trainer(tmp_path / "mapped", "vit", before)
    mapped.train()
    np.testing.assert_allclose(scores, mapped.featurize().score(before, progress=False), rtol=1e-4, atol=1e-6)


def test_random_rows_are_refused_before_training_unless_the_others_are_given(tmp_path):
    steps = Steps()
    trainer = make_trainer(tmp_path / "random", "vit", PIXELS.with_transform(augmented), callbacks=[steps])
    with pytest.raises(ValueError, match="not the same twice.*`attribution_dataset`"):
        trainer.train()
    assert sum(steps.runs) == 0
    trainer = make_trainer(
        tmp_path / "both", "vit", PIXELS.with_transform(augmented), attribution_dataset=PIXELS.with_transform(pixels)
    )
    trainer.train()
    args = TrainingArguments(str(tmp_path / "stock"), **{**OPTIONS, "num_train_epochs": 1, "remove_unused_columns": False})
    stock = Trainer(model=make_model("vit"), args=args, train_dataset=PIXELS.with_transform(augmented))
    stock.train()
    assert_equal_models(trainer.model, stock.model)
    assert trainer.featurize().score(PIXELS.with_transform(pixels), progress=False).shape == (6, 6)
    with pytest.raises(ValueError, match="it has 2 rows and `train_dataset` 6"):
        make_trainer(tmp_path / "few", "vit", PIXELS, attribution_dataset=PIXELS.select([0, 1]))


def test_a_torch_dataset_trains_where_its_rows_are_given_as_a_dataset_too(tmp_path):
    rows = token_rows(12)
    trainer = make_trainer(
        tmp_path, "bert", torch.utils.data.Subset(rows, range(12)), attribution_dataset=rows, data_collator=collate,
        options={"members": "subsets:2"},
    )  # fmt: skip
    trainer.train()
    assert trainer.featurize().members[0].mask().sum() == 6


def test_labels_whose_names_are_in_another_order_than_the_models_are_refused_before_training(tmp_path):
    rows = token_rows(12).cast_column("label", ClassLabel(names=["a", "b", "c"]))
    for mapping, message in (("auto", "in another order"), ("by_name", "Attribution would follow the names")):
        steps = Steps()
        trainer = make_trainer(
            tmp_path, "bert", rows, data_collator=collate, callbacks=[steps], options={"label_mapping": mapping}
        )
        trainer.model.config.id2label, trainer.model.config.label2id = {0: "c", 1: "b", 2: "a"}, {"c": 0, "b": 1, "a": 2}
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert sum(steps.runs) == 0


def padded_per_batch(rows, *, tensors: bool, masked: bool):
    found = TOKENIZER(list(rows["sentence"]), padding=True, **({"return_tensors": "pt"} if tensors else {}))
    kept = {name: values for name, values in found.items() if masked or name != "attention_mask"}
    return {**kept, "labels": torch.tensor(rows["label"]) if tensors else rows["label"]}


@pytest.mark.parametrize("tensors", [False, True])
def test_a_transform_that_pads_each_batch_is_served_where_it_gives_a_mask(tmp_path, tensors):
    given = {"processing_class": TOKENIZER, "data_collator": DataCollatorWithPadding(TOKENIZER)}
    rows = TEXTS.with_transform(partial(padded_per_batch, tensors=tensors, masked=True))
    trainer = make_trainer(tmp_path / "masked", "bert", rows, options={"damping": "0.1"}, **given)
    trainer.train()
    scores = trainer.featurize().score(rows.select([1, 2]), progress=False)
    plain = TEXTS.map(tokenize, batched=True, remove_columns=TEXTS.column_names)
    np.testing.assert_allclose(scores, trainer.index.score(plain.select([1, 2]), progress=False), rtol=1e-4, atol=1e-6)
    unmasked = TEXTS.with_transform(partial(padded_per_batch, tensors=tensors, masked=False))
    with pytest.raises(ValueError, match=r"not the same twice.*padding without an 'attention_mask'"):
        make_trainer(tmp_path / "unmasked", "bert", unmasked, **given).train()


def test_labels_that_are_strings_are_refused_before_the_first_step(tmp_path):
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    rows = TEXTS.remove_columns("label").add_column("label", ["x", "y", "z"] * 2).map(lambda row: TOKENIZER(row["sentence"]))
    args = AttributionArguments(str(tmp_path), **{**OPTIONS, "proj_dim": 16})
    given = {"train_dataset": rows, "processing_class": TOKENIZER, "data_collator": DataCollatorWithPadding(TOKENIZER)}
    with pytest.raises(ValueError, match=r"The labels in 'label' are strings.*model\.config\.label2id\[row\['label'\]\]"):
        AttributionTrainer(model=bert(**names), args=args, **given).train()
