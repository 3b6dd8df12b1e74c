"""Every block of code in docs/guides/custom_tasks.md is run, and what it attributes is what it says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import VOCAB_SIZE, bert
from torch import nn
from transformers import BertModel

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, Task, TrakConfig
from hf_trak.cli.main import main

DOCS = Path(__file__).parents[1] / "docs" / "guides" / "custom_tasks.md"
MARKED = re.compile(r"<!-- example: ([^>]*) -->\n```(?:python|bash)\n(.*?)```", re.DOTALL)
EXAMPLES = dict(MARKED.findall(DOCS.read_text(encoding="utf-8")))
CONFIG = TrakConfig(proj_dim=16)
RUN_ELSEWHERE = {"class weights"}  # tests/test_custom_tasks.py, against leaving rows out

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name, **names):
    """Run an example, and return its names."""
    names = {"config": CONFIG, **names}
    exec(compile(EXAMPLES[name], f"{DOCS} ({name})", "exec"), names)
    return names


def collator(rows):
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([row["label"] for row in rows])}


def token_ids(generator):
    return generator.integers(3, VOCAB_SIZE, size=generator.integers(3, 9)).tolist()


def rows(n_rows, label, *, seed=0):
    generator = np.random.default_rng(seed)
    return Dataset.from_list([{"input_ids": token_ids(generator), "label": label(generator)} for _ in range(n_rows)])


def stored(index):
    """Return outputs, out_to_loss and the norms of gradients of the training rows."""
    columns = index.features(0).with_format("numpy")
    return columns["trak_output"][:], columns["trak_out_to_loss"][:]


def logits_of(model, dataset):
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits for row in dataset]).numpy()


def test_every_block_of_code_is_an_example():
    blocks = re.findall(r"^```(?:python|bash)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(EXAMPLES) == len(blocks) - 1, "all but the signature at the top are marked"
    tested = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in EXAMPLES if f'run("{name}"' not in tested} == {*RUN_ELSEWHERE, "command line"}


def test_own_output():
    torch.manual_seed(0)
    model = BertModel(bert().config, add_pooling_layer=False)
    generator = np.random.default_rng(0)
    train = Dataset.from_list(
        [
            {"first_ids": token_ids(generator), "second_ids": token_ids(generator), "score": float(generator.random())}
            for _ in range(9)
        ]
    )
    found = run("own output", model=model, train=train)
    outputs, residuals = stored(found["index"])
    for place, row in enumerate(train):
        with torch.no_grad():
            first, second = (
                model.eval()(torch.tensor([row[name]])).last_hidden_state.mean(1) for name in ("first_ids", "second_ids")
            )
        cosine = nn.functional.cosine_similarity(first, second).item()
        assert abs(outputs[place] - cosine) < 1e-5
        assert abs(residuals[place] - (row["score"] - cosine)) < 1e-5
    assert np.ptp(outputs) > 1e-3


def test_one_label_of_several():
    torch.manual_seed(0)
    names = {"id2label": {0: "rude", 1: "toxic", 2: "spam"}, "label2id": {"rude": 0, "toxic": 1, "spam": 2}}
    model = bert(num_labels=3, problem_type="multi_label_classification", **names)
    train = rows(9, lambda generator: generator.integers(0, 2, 3).astype(float).tolist())
    found = run("one label of several", model=model, train=train, collator=collator)
    outputs, weights = stored(found["index"])
    logit = logits_of(model, train)[:, 1]
    given = np.array(train["label"])[:, 1] > 0
    expected = np.where(given, logit, -logit)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(expected)), atol=1e-5)
    assert 0 < given.sum() < len(given)
    scores = AttributionIndex.from_pretrained("out/toxic", models=model, task=found["toxic"]).score(train, progress=False)
    assert np.isfinite(scores).all()


def test_regression_on_several_numbers():
    torch.manual_seed(0)
    model = bert(num_labels=3, problem_type="regression")
    train = rows(9, lambda generator: generator.normal(size=3).astype(np.float32).tolist())
    found = run("regression on several numbers", model=model, train=train, collator=collator)
    outputs, residuals = stored(found["index"])
    predicted = logits_of(model, train)[:, 1]
    np.testing.assert_allclose(outputs, predicted, atol=1e-5)
    np.testing.assert_allclose(residuals, np.array(train["label"])[:, 1] - predicted, atol=1e-5)


def test_several_outputs_of_one_index():
    torch.manual_seed(0)
    model = bert(num_labels=3)
    train, validation = (rows(n, lambda generator: int(generator.integers(0, 3)), seed=n) for n in (9, 4))
    found = run("several outputs of one index", model=model, train=train, validation=validation, collator=collator)
    index = found["index"]

    def ask(pairs):
        return index.score(validation.add_column("contrast", pairs), progress=False)

    def contrast(first, second):
        return ask([[first, second]] * len(validation))

    np.testing.assert_array_equal(found["why_2_not_0"], contrast(2, 0))
    # Scores are linear in the query's output.
    scale = np.abs(found["why_2_not_0"]).max()
    np.testing.assert_allclose(contrast(2, 1) + contrast(1, 0), contrast(2, 0), atol=1e-4 * scale)
    np.testing.assert_allclose(contrast(0, 2), -contrast(2, 0), atol=1e-4 * scale)
    assert not np.allclose(found["why_label"], contrast(2, 0), atol=1e-2 * scale)
    ordinary = Task.custom(
        lambda model, batch: found["output"](model, {**batch, "contrast": torch.full((len(batch["labels"]), 2), -1)}),
        out_to_loss=lambda model, batch: found["one_minus_p"](model, batch),
        out_to_loss_kind="one_minus_p",
        collator=collator,
    )
    plain = AttributionIndex.build("out/plain", models=model, dataset=train, config=CONFIG, task=ordinary, progress=False)
    np.testing.assert_allclose(found["why_label"], plain.score(validation, progress=False), rtol=1e-3, atol=1e-5 * scale)


TASKS_MODULE = """
import torch
from hf_trak import Task


def collator(rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": torch.tensor([row["label"] for row in rows])}


def logit(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.gather(1, batch["labels"].unsqueeze(1)).squeeze(1)


task = Task.custom(logit, collator=collator)
"""


def test_reloading_and_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "my_tasks", raising=False)
    (tmp_path / "my_tasks.py").write_text(TASKS_MODULE)
    torch.manual_seed(0)
    bert(num_labels=3).save_pretrained(tmp_path / "my-model")
    train, validation = (rows(n, lambda generator: int(generator.integers(0, 3)), seed=n) for n in (9, 4))
    train.to_parquet(tmp_path / "train.parquet")
    validation.to_parquet(tmp_path / "validation.parquet")
    commands = EXAMPLES["command line"].strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "hf-trak"
        extra = ["--proj_dim", "16"] if arguments[0] == "featurize" else []
        assert main([*arguments, *extra]) == 0, capsys.readouterr().err
    assert len((tmp_path / "hits.jsonl").read_text().splitlines()) == 4
    found = run("reloading", validation=validation)
    assert found["scores"].shape == (9, 4)
    assert np.isfinite(found["scores"]).all()
    sys.modules.pop("my_tasks")


class Bag(nn.Module):
    """Classifies the mean of its tokens' vectors."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        mask = input_ids.ne(0).unsqueeze(2)
        logits = self.head((self.table(input_ids) * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def chosen_logit(model, batch):
    logits = model(batch["input_ids"])["logits"]
    return logits.gather(1, batch["labels"].unsqueeze(1)).squeeze(1)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.utils.data")
def test_plain_modules():
    train, validation = (rows(n, lambda generator: int(generator.integers(0, 3)), seed=n) for n in (12, 4))
    task = Task.custom(chosen_logit, collator=collator)
    args = AttributionArguments(
        "out", use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True, proj_dim=16, num_train_epochs=2,
        members="epoch:2",
    )  # fmt: skip
    trainer = AttributionTrainer(model=Bag(), args=args, train_dataset=train, data_collator=collator, task=task)
    trainer.train()
    expected = trainer.featurize().score(validation, progress=False)
    found = run("plain modules", MyModule=Bag, task=task)
    assert len(found["models"]) == 2
    np.testing.assert_array_equal(found["index"].score(validation, progress=False), expected)
