"""What attribution would refuse after training is refused before the first step, and what it serves trains and attributes."""

import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from datasets_for_tests import token_rows
from models import N_CLASSES, Tied, make_model
from test_runs import OPTIONS, Steps, collate
from tokenizers_for_tests import word_tokenizer
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_trak import AttributionArguments, AttributionCallback, AttributionIndex, AttributionTrainer, Task
from hf_trak.storage.snapshots import LIST_NAME
from hf_trak.training.snapshots import load_snapshot, save_snapshot

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TRAIN, VALIDATION = token_rows(24), token_rows(4, seed=1)
TEXTS = Dataset.from_dict({"text": ["a b", "c d e", "f"] * 4, "label": [0, 1, 2] * 4})


def make_trainer(folder, *, given=None, **options):
    args = AttributionArguments(str(folder), **{**OPTIONS, "num_train_epochs": 1, "proj_dim": 16, **options})
    rows = {"train_dataset": TRAIN, "eval_dataset": VALIDATION, "data_collator": collate}
    return AttributionTrainer(args=args, **{"model": make_model("bert"), **rows, **(given or {})})


class Plain(torch.nn.Module):
    """A module around a transformers model."""

    def __init__(self):
        super().__init__()
        self.encoder = make_model("bert").bert
        self.head = torch.nn.Linear(16, N_CLASSES)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.encoder(input_ids, attention_mask).last_hidden_state[:, 0])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TiedModule(torch.nn.Module):
    """Two names of one matrix."""

    def __init__(self):
        super().__init__()
        self.inner = Tied()

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.inner(input_ids, attention_mask).logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class TwoHeads(BertForSequenceClassification):
    """A class of transformers' kind that transformers does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.second = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        pooled = self.bert(input_ids, attention_mask).pooler_output
        logits = self.classifier(pooled) + self.second(pooled)
        return SimpleNamespace(logits=logits) if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ShadowedBert(TwoHeads):
    """Under a name that transformers does have."""


ShadowedBert.__name__ = "BertForSequenceClassification"


def loss_of(model, batch):
    return F.cross_entropy(model(**batch)["logits"], batch["labels"], reduction="none")


LOSS = {"task": Task.custom(loss_of, collator=collate)}


def multi_label_without_a_task(folder):
    model = make_model("bert")
    model.config.problem_type = "regression"  # on several numbers
    return make_trainer(folder, given={"model": model})


def lazy_module(folder):
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.lazy = torch.nn.LazyLinear(2)

    return make_trainer(folder, given={"model": Lazy(), **LOSS})


def full_disk(folder):
    trainer = make_trainer(folder, members="epoch:3")
    shutil.disk_usage = lambda path: SimpleNamespace(free=1000)  # restored by the test
    return trainer


def not_ours(folder):
    (folder / "members" / "final").mkdir(parents=True)
    (folder / "members" / "final" / "thesis.txt").write_text("mine")
    return make_trainer(folder)


def broken_task(folder):
    def output(model, batch):
        return batch["missing"]

    return make_trainer(folder, given={"task": Task.custom(output, collator=collate)})


def unsaved_processor(folder):
    return make_trainer(folder, given={"processing_class": SimpleNamespace(model_input_names=["input_ids"])})


REFUSED = {
    "no task": (lambda folder: make_trainer(folder, given={"model": Plain()}), "No task serves a Plain.*Task.custom"),
    "task of no class": (multi_label_without_a_task, "regression on 3 numbers per example"),
    "DatasetDict": (
        lambda folder: make_trainer(folder, given={"train_dataset": DatasetDict(train=TRAIN, test=VALIDATION)}),
        r"is a DatasetDict of train, test. Give one of its splits, such as `dataset\['train'\]`",
    ),
    "list": (lambda folder: make_trainer(folder, given={"train_dataset": TRAIN.to_list()}), r"is a list.*Dataset.from_list"),
    "columns": (lambda folder: make_trainer(folder, given={"train_dataset": TRAIN.to_dict()}), "Dataset.from_dict"),
    "DataFrame": (lambda folder: make_trainer(folder, given={"train_dataset": TRAIN.to_pandas()}), "Dataset.from_pandas"),
    "torch": (
        lambda folder: make_trainer(folder, given={"train_dataset": torch.utils.data.Subset(TRAIN, [0])}),
        "is a Subset.*Dataset.from_list",
    ),
    "runs on a stream": (
        lambda folder: make_trainer(
            folder, max_steps=2, members="runs:2", given={"train_dataset": TRAIN.to_iterable_dataset()}
        ),
        "members='runs:2' trains again on rows that have numbers",
    ),
    "workers of a stream": (
        lambda folder: make_trainer(
            folder, max_steps=2, dataloader_num_workers=2, given={"train_dataset": TRAIN.to_iterable_dataset()}
        ),
        "dataloader_num_workers=2 reads the parts of a streaming `train_dataset` in turn",
    ),
    "more of a stream than training": (
        lambda folder: make_trainer(folder, max_steps=1, n_rows=10_000, given={"train_dataset": TRAIN.to_iterable_dataset()}),
        "n_rows=10000, but training reads",
    ),
    "rows of no stream": (lambda folder: make_trainer(folder, n_rows=4), "`n_rows` says how many rows of a streaming"),
    "none": (lambda folder: make_trainer(folder, given={"train_dataset": None}), "is None. Give the rows"),
    "empty": (lambda folder: make_trainer(folder, given={"train_dataset": TRAIN.select([])}), "The training set is empty"),
    "queries": (
        lambda folder: make_trainer(folder, given={"eval_dataset": VALIDATION.to_pandas()}),
        "`eval_dataset` is a DataFrame, which `Trainer` cannot evaluate",
    ),
    "no tokenizer": (
        lambda folder: make_trainer(folder, remove_unused_columns=False, given={"train_dataset": TEXTS}),
        "need a tokenizer",
    ),
    "dropped columns": (
        lambda folder: make_trainer(folder, given={"train_dataset": TEXTS, "processing_class": word_tokenizer()}),
        "reads 'text', 'label', but `Trainer` drops 'text'",
    ),
    "another label": (
        lambda folder: make_trainer(
            folder, label_column="score", given={"train_dataset": TRAIN.add_column("score", [0] * len(TRAIN))}
        ),
        "`Trainer` drops 'score'",
    ),
    "labels": (
        lambda folder: make_trainer(
            folder, given={"train_dataset": TRAIN.map(lambda row, i: {"label": 7 if i == 20 else 0}, with_indices=True)}
        ),
        "7 (at|in) row 20",
    ),
    "proj_dim": (lambda folder: make_trainer(folder, proj_dim=10**6), "proj_dim=1,000,000 is more than"),
    "parameters": (lambda folder: make_trainer(folder, parameters=["nothing"]), "'nothing' matches none"),
    "broken task": (broken_task, "Featurizing failed for rows 0, 1 of the training set.*KeyError: 'missing'"),
    "lazy module": (lazy_module, "'lazy.weight' in the `state_dict` of this Lazy is a UninitializedParameter"),
    "tied checkpoints": (
        lambda folder: make_trainer(folder, save_strategy="epoch", given={"model": TiedModule(), **LOSS}),
        "embedding.weight and inner.head.weight share memory.*save_strategy='no'",
    ),
    "late steps": (lambda folder: make_trainer(folder, members="steps:[2,9]"), "after step 9, but the run ends at step 3"),
    "full disk": (full_disk, "4 snapshots of the weights need .* GB are free"),
    "not ours": (not_ours, "members/final was not written by hf_trak"),
    "file for a folder": (lambda folder: (folder / "out").write_text("") or make_trainer(folder / "out" / "run"), "out/run"),
    "processor": (unsaved_processor, "is a SimpleNamespace, which cannot be saved"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_cannot_be_attributed_is_refused_before_the_first_step(tmp_path, name, monkeypatch):
    make, message = REFUSED[name]
    monkeypatch.setattr(shutil, "disk_usage", shutil.disk_usage)
    steps = Steps()
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):  # noqa: PT012 (some are refused when the trainer is made)
        trainer = make(tmp_path)
        trainer.add_callback(steps)
        trainer.train()
    assert sum(steps.runs) == 0
    assert not list(tmp_path.glob("members/.tried-*")), "what was tried is removed"
    if name == "not ours":
        assert (tmp_path / "members" / "final" / "thesis.txt").read_text() == "mine"


def test_a_rehearsal_draws_no_random_number(tmp_path):
    trainer = make_trainer(tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer._check_before_training()
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002


@pytest.mark.parametrize(
    ("make", "members"),
    [
        (Plain, "epoch:2"),
        pytest.param(Plain, "runs:2", marks=pytest.mark.slow),
        (TiedModule, "final"),
        (TwoHeads, "final"),
        (ShadowedBert, "runs:2"),
    ],
    ids=["plain", "plain runs", "tied", "own class", "name of another class"],
)
def test_a_module_that_does_not_load_by_its_name_trains_and_is_attributed(tmp_path, make, members):
    config = {
        "vocab_size": 60,
        "num_labels": 3,
        "pad_token_id": 0,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }

    def module():
        torch.manual_seed(0)
        return make(BertConfig(**config, intermediate_size=24)) if issubclass(make, BertForSequenceClassification) else make()

    trainer = make_trainer(tmp_path, members=members, num_train_epochs=2, given={"model": module(), **LOSS})
    trainer.train()
    index = trainer.featurize()
    assert len(index.members) == len(trainer.member_checkpoints()) == (1 if members == "final" else 2)
    assert len(trainer.attribute(top_k=2)) == len(VALIDATION)
    last = load_snapshot(trainer.member_checkpoints()[0 if members == "runs:2" else -1], module())
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(last.state_dict()[name], value), name
    with torch.no_grad():
        expected = loss_of(trainer.model.eval(), collate(TRAIN.to_list()))
    member = index.members[0 if members == "runs:2" else -1]
    torch.testing.assert_close(torch.cat([shard.output for shard in member.shards()]), expected, rtol=1e-5, atol=1e-6)
    models = [load_snapshot(folder, module()) for folder in trainer.member_checkpoints()]
    loaded = AttributionIndex.from_pretrained(index.folder, models=models, **LOSS)
    assert np.array_equal(loaded.score(VALIDATION, progress=False), index.score(VALIDATION, progress=False))


def test_a_copy_under_mixed_precision_computes_with_its_own_weights(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, members="epoch:2", num_train_epochs=2, given={"model": Plain(), **LOSS})
    trainer.train()
    first, last = trainer.member_models()
    batch = collate(TRAIN.to_list()[:3])
    with torch.no_grad():
        assert not torch.allclose(first.eval()(**batch)["logits"], last.eval()(**batch)["logits"])
        assert first(**batch)["logits"].dtype == torch.float32
        torch.testing.assert_close(
            load_snapshot(trainer.member_checkpoints()[0], Plain()).eval()(**batch)["logits"], first(**batch)["logits"]
        )


def test_weights_of_another_module_are_refused(tmp_path):
    save_snapshot(tmp_path / "one", TiedModule())
    with pytest.raises(ValueError, match="are not those of this Plain: missing are encoder"):
        load_snapshot(tmp_path / "one", Plain())


def test_one_of_several_evaluation_sets_is_named_and_it_is_said_before_training(tmp_path, caplog):
    steps = Steps()
    trainer = make_trainer(tmp_path, given={"eval_dataset": {"a": VALIDATION, "b": TRAIN}, "callbacks": [steps]})
    with caplog.at_level(logging.WARNING):
        trainer._check_before_training()
    assert "several sets (a, b)" in caplog.text
    trainer.train()
    assert len(trainer.attribute("a", top_k=2)) == len(VALIDATION)
    assert len(trainer.attribute(queries=TRAIN, top_k=2)) == len(TRAIN)
    with pytest.raises(ValueError, match=r"say `attribute\(queries='a'\)`"):
        trainer.attribute()
    with pytest.raises(ValueError, match="There is no evaluation set 'c' in `eval_dataset`; it has a, b"):
        trainer.attribute("c")
    with pytest.raises(ValueError, match="Queries must be a `datasets.Dataset`, but are a list"):
        trainer.attribute(VALIDATION.to_list())


def test_the_callers_arguments_stay_as_they_are(tmp_path):
    args = AttributionArguments(str(tmp_path), proj_dim=16, **{**OPTIONS, "num_train_epochs": 1})
    rows = Dataset.from_dict({"text": ["a b c", "d e f g"] * 4})
    trainer = AttributionTrainer(model=make_model("gpt2 lm"), args=args, train_dataset=rows, processing_class=word_tokenizer())
    assert args.remove_unused_columns
    assert not trainer.args.remove_unused_columns
    trainer.train()
    assert args.remove_unused_columns


def stock_trainer(folder, callback, **options):
    args = TrainingArguments(str(folder), **{**OPTIONS, "num_train_epochs": 2, **options})
    return Trainer(model=make_model("bert"), args=args, train_dataset=TRAIN, data_collator=collate, callbacks=[callback])


def test_the_callback_deletes_nothing_but_snapshots(tmp_path):
    members = tmp_path / "members"
    stock_trainer(tmp_path, AttributionCallback("epoch:1")).train()
    for name in ("notes", "epoch-notes", "final-report"):
        (members / name).mkdir()
        (members / name / "thesis.txt").write_text("mine")
    (members / "epoch-0002" / "notes.txt").write_text("mine, too")
    stock_trainer(tmp_path, AttributionCallback("epoch:1"), num_train_epochs=1).train()
    assert [(members / name / "thesis.txt").read_text() for name in ("notes", "epoch-notes", "final-report")] == ["mine"] * 3
    assert (members / "kept-0-epoch-0002" / "notes.txt").read_text() == "mine, too"
    assert sorted(path.name for path in members.glob("epoch-0*")) == ["epoch-0001"]
    record = json.loads((members / "epoch-0001" / LIST_NAME).read_text())
    assert set(record["files"]) == {path.name for path in (members / "epoch-0001").iterdir()} - {LIST_NAME}


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: (folder / "members" / "epoch-0001" / "mine").mkdir(parents=True), {}, "was not written by hf_trak"),
        (lambda folder: (folder / "members").write_text(""), {}, "members"),
    ],
    ids=["name taken", "file in the way"],
)
def test_the_callback_refuses_before_the_first_step(tmp_path, prepare, options, message):
    prepare(tmp_path)
    steps = Steps()
    trainer = stock_trainer(tmp_path, AttributionCallback("epoch:1"), **options)
    trainer.add_callback(steps)
    with pytest.raises((ValueError, OSError), match=message):
        trainer.train()
    assert sum(steps.runs) == 0


def test_the_callback_refuses_to_upload_an_index(tmp_path):
    trainer = stock_trainer(tmp_path, AttributionCallback())
    trainer.train()
    AttributionIndex.build(tmp_path / "index", models=tmp_path / "members" / "final", dataset=TRAIN, progress=False)
    with pytest.raises(ValueError, match="holds an index, index, and `Trainer` would upload its features"):
        trainer.push_to_hub()


def test_a_snapshot_that_cannot_be_written_leaves_nothing_and_the_old_one_stays(tmp_path):
    save_snapshot(tmp_path / "final", make_model("bert"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}

    class Full:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"final was not written: No space left on device. Training can go on"):
        save_snapshot(tmp_path / "final", make_model("bert", seed=1), Full())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before
