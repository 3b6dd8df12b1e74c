"""Queries are read as the training set was: another tokenizer or image processor is noticed."""

import json
import warnings

import numpy as np
import pytest
from datasets import Dataset
from datasets_for_tests import save_model, token_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers_for_tests import WORDS, word_tokenizer
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.sources.processors import describe_processing


def other_tokenizer():
    """The same words under other numbers."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(reversed(WORDS))}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")


def test_a_description_does_not_depend_on_what_was_tokenized_before():
    tokenizer = word_tokenizer()
    before = describe_processing(tokenizer)
    tokenizer(["a b", "c"], padding="max_length", truncation=True, max_length=3)
    assert describe_processing(tokenizer) == before
    assert describe_processing(other_tokenizer()) != before
    assert json.loads(json.dumps(before)) == before


def test_image_processors_are_told_apart_by_size_and_normalization():
    usual = describe_processing(ViTImageProcessor(size={"height": 16, "width": 16}))
    assert usual["images"]["pixels"] == [3, 16, 16]
    others = [
        ViTImageProcessor(size={"height": 8, "width": 8}),
        ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.2] * 3),
        ViTImageProcessor(size={"height": 16, "width": 16}, image_std=[0.2] * 3),
    ]
    assert all(describe_processing(other) != usual for other in others)
    assert describe_processing(ViTImageProcessor(size={"height": 16, "width": 16})) == usual


def test_what_is_neither_is_not_described():
    assert describe_processing(None) == {}
    assert describe_processing(object()) == {}


def test_an_index_is_not_asked_through_another_tokenizer(tmp_path):
    model = save_model(tmp_path / "bert")
    word_tokenizer().save_pretrained(model)
    rows = Dataset.from_dict({"text": ["a b c", "d e", "f g h i", "j a"] * 3, "label": [0, 1, 2, 0] * 3})
    config = TrakConfig(proj_dim=16, text_columns="text", max_length=8)
    index = AttributionIndex.build(tmp_path / "index", models=model, dataset=rows, config=config, progress=False)
    expected = index.score(rows, progress=False)
    same = AttributionIndex.from_pretrained(tmp_path / "index", processing_class=word_tokenizer())
    assert np.array_equal(same.score(rows, progress=False), expected)
    other = AttributionIndex.from_pretrained(tmp_path / "index", processing_class=other_tokenizer())
    with pytest.raises(
        ValueError, match=r"(?s)not what member_0 .*processing\.tokenizer\.tokens: .* there, .* here.*processing_class"
    ):
        other.score(rows, progress=False)


def test_an_index_that_says_nothing_of_it_is_asked_as_before(tmp_path):
    """As those made before it was recorded, and those of rows that were tokenized before."""
    model = save_model(tmp_path / "bert")
    config = TrakConfig(proj_dim=16)
    index = AttributionIndex.build(tmp_path / "index", models=model, dataset=token_rows(12), config=config, progress=False)
    assert "processing" not in index.members[0].identity
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_one = AttributionIndex.from_pretrained(tmp_path / "index", processing_class=word_tokenizer())
        assert np.isfinite(with_one.score(token_rows(3, seed=1), progress=False)).all()
