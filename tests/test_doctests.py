"""Examples of docstrings run as printed, on a tiny classifier; and public classes and methods have one."""

import copy
import doctest
import inspect
import os
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import hf_trak
from hf_trak import projectors

WORDS = ["a", "fine", "story", "well", "told", "dull", "film", "plot", "good", "bad"]
# Their examples would need the Hub, a terminal or an extension; or they are steps of a method that has one.
WITHOUT = {
    "AttributionIndex.merge",  # in the example of `build_shards`
    "AttributionIndex.push_to_hub",
    "AttributionIndex.add_search_index",  # FAISS
    "AttributionIndex.scores_of_rows",  # of queries that are solved
    "TrakConfig.push_to_hub",
    "projectors.FastJL",  # CUDA
    "projectors.Projector",  # abstract
}
CLASSES = {name: getattr(hf_trak, name) for name in hf_trak.__all__} | {
    f"projectors.{name}": getattr(projectors, name) for name in projectors.__all__ if name[0].isupper() and not name.isupper()
}
METHODS_OF = ("AttributionIndex", "TrakConfig", "AutoTask", "Explanation")
"""Classes of which every public method has an example of its own; of the others, the class's example shows how methods are called."""


def documented():
    """Return the public classes and functions, and their public methods, by name."""
    found = dict(CLASSES) | {"projectors.make_projector": projectors.make_projector}
    for name, kind in CLASSES.items():
        for method in dir(kind) if inspect.isclass(kind) else ():
            member = inspect.getattr_static(kind, method)
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if not method.startswith("_") and getattr(function, "__module__", "").startswith("hf_trak") and callable(function):
                found[f"{name}.{method}"] = function
    return found


EXAMPLES = {name: thing for name, thing in documented().items() if ">>>" in (thing.__doc__ or "")}


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Return what examples find: a model with its tokenizer, rows, and an index of them."""
    folder = tmp_path_factory.mktemp("doctests")
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)
    torch.manual_seed(0)
    model = bert(num_labels=2).eval()
    model.save_pretrained(folder / "my-bert")
    tokenizer.save_pretrained(folder / "my-bert")
    generator = np.random.default_rng(0)
    rows = {}
    for name, n_rows in (("train", 40), ("validation", 8)):
        texts = [" ".join(generator.choice(WORDS, 5)) for _ in range(n_rows)]
        rows[name] = Dataset.from_dict({"text": texts, "label": generator.integers(0, 2, n_rows).tolist()})
    config = hf_trak.TrakConfig(proj_dim=64)
    index = hf_trak.AttributionIndex.build(
        folder / "my-index",
        models=str(folder / "my-bert"),
        dataset=rows["train"],
        config=config,
        keep_columns=["text", "label"],
        shard_rows=16,
        progress=False,
    )
    public = {name: getattr(hf_trak, name) for name in hf_trak.__all__}
    libraries = {
        "copy": copy,
        "os": os,
        "torch": torch,
        "Dataset": Dataset,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
    }
    return folder, {**public, **libraries, "model": model, "tokenizer": tokenizer, "index": index, **rows}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_printed(names, name, monkeypatch, capsys):
    folder, given = names
    monkeypatch.chdir(folder)
    text = re.sub(r"^\s*```\w*$", "", inspect.getdoc(EXAMPLES[name]), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(text, dict(given), name, None, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(test, out=report.append)
    assert not report, "".join(report)


def test_public_classes_and_methods_have_an_example():
    silent = {name for name in documented() if name not in EXAMPLES}
    own = {name for name in silent if name in CLASSES or name.split(".")[0] in METHODS_OF}
    assert own == WITHOUT
