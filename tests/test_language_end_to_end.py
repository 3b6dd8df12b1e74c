"""Language models from rows as users have them to scores: the Trainer, the index and the command line say the same."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from models import make_model
from tokenizers_for_tests import WORDS, word_tokenizer

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.config import CONFIG_NAME, FORMAT_VERSION
from hf_trak.querying.examples import Example, ExampleReader, LanguageRows

# Trainer's loader asks for pinned memory where there is none.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
N_TRAIN, N_QUERIES, PROJ_DIM = 8, 2, 16


def rows_of(kind: str, n_rows: int, *, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(generator.choice(list("abcdefghij"), size=generator.integers(2, 5)))

    def tokens() -> list[int]:
        return generator.integers(3, len(WORDS), size=generator.integers(2, 6)).tolist()

    if kind == "messages":
        pairs = [[{"role": "user", "content": words()}, {"role": "assistant", "content": words()}] for _ in range(n_rows)]
        return Dataset.from_dict({"messages": pairs})
    if kind == "text":
        return Dataset.from_dict({"text": [words() for _ in range(n_rows)]})
    if kind == "text and target":
        return Dataset.from_dict({"text": [words() for _ in range(n_rows)], "target": [words() for _ in range(n_rows)]})
    return Dataset.from_dict({"input_ids": [tokens() for _ in range(n_rows)], "labels": [tokens() for _ in range(n_rows)]})


@pytest.mark.parametrize(("model", "kind"), [("llama lm", "messages"), ("gpt2 lm", "text"), ("t5", "tokens")])
def test_rows_are_trained_on_featurized_and_attributed_as_they_are(model: str, kind: str, tmp_path: Path):
    train, queries = rows_of(kind, N_TRAIN), rows_of(kind, N_QUERIES, seed=1)
    args = AttributionArguments(
        str(tmp_path), proj_dim=PROJ_DIM, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=5e-2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = AttributionTrainer(
        model=make_model(model),
        args=args,
        train_dataset=train,
        eval_dataset=queries,
        processing_class=None if kind == "tokens" else word_tokenizer(),
    )
    before = trainer.evaluate(train)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(train)["eval_loss"] < before
    index = trainer.featurize()
    hits = trainer.attribute(top_k=3)
    scores = index.score(queries, progress=False)
    assert scores.shape == (N_TRAIN, N_QUERIES)
    assert np.isfinite(scores).all()
    loaded = AttributionIndex.from_pretrained(tmp_path / "index")
    np.testing.assert_array_equal(loaded.score(queries, progress=False), scores)
    for number, hit in enumerate(hits):
        assert hit["proponents"] == (-scores[:, number]).argsort(kind="stable")[:3].tolist()
        np.testing.assert_array_equal(np.float32(hit["proponent_scores"]), np.sort(scores[:, number])[::-1][:3])


def test_a_training_batch_is_what_is_featurized_and_its_loss_that_of_the_scored_tokens(tmp_path: Path):
    rows = rows_of("messages", 3)
    args = AttributionArguments(str(tmp_path), proj_dim=PROJ_DIM, loss_on="assistant", use_cpu=True, report_to="none")
    trainer = AttributionTrainer(
        model=make_model("gpt2 lm").eval(), args=args, train_dataset=rows, processing_class=word_tokenizer()
    )
    batch = trainer.data_collator(list(rows))
    result = trainer.model(**batch)
    logits, labels = result.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    scored = labels != -100
    expected = torch.nn.functional.cross_entropy(logits[scored], labels[scored])
    torch.testing.assert_close(result.loss, expected)
    answers = [[*word_tokenizer()(row["messages"][1]["content"])["input_ids"], 1] for row in rows]
    assert labels[scored].tolist() == [token for answer in answers for token in answer]


@pytest.mark.parametrize(
    ("model", "kind", "flags"),
    [
        ("gpt2 lm", "messages", ["--token_reduction", "sum", "--token_out_to_loss", "exact"]),
        ("t5", "text and target", ["--score_tokens", "content"]),
    ],
)
def test_the_command_line_says_what_the_index_says_and_shows_the_rows(model: str, kind: str, flags: list[str], tmp_path: Path):
    pytest.importorskip("matplotlib")
    train, queries = rows_of(kind, N_TRAIN), rows_of(kind, N_QUERIES, seed=1)
    for name, rows in {"train": train, "queries": queries}.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
    make_model(model).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    where = {name: str(tmp_path / name) for name in ("model", "index", "hits.jsonl", "report")}
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "queries")}
    featurize = ["featurize", "--model", where["model"], "--dataset", files["train"], "--output", where["index"]]
    assert main([*featurize, "--proj_dim", str(PROJ_DIM), *flags]) == 0
    attribute = ["attribute", "--index", where["index"], "--queries", files["queries"], "--output", where["hits.jsonl"]]
    assert main([*attribute, "--train", files["train"], "--report", where["report"], "--top_k", "3"]) == 0

    config = AttributionIndex.from_pretrained(where["index"]).config
    built = AttributionIndex.build(tmp_path / "api", models=where["model"], dataset=train, config=config, progress=False)
    hits = [json.loads(line) for line in Path(where["hits.jsonl"]).read_text().splitlines()]
    assert hits == list(built.attribute(queries, 3, progress=False))
    page = " ".join(unescape((tmp_path / "report" / "report.html").read_text(encoding="utf-8")).split())
    for number in {row for hit in hits for row in hit["proponents"]}:
        assert shown(kind, train[number]) in page
    assert shown(kind, queries[0]) in page


def shown(kind: str, row: dict[str, Any]) -> str:
    """Return what a reader is to see of a row."""
    if kind == "messages":
        return " / ".join(f"{message['role']}: {message['content']}" for message in row["messages"])
    first, second = row.values()
    return f"{first} → {second}"


# Indexes.


def test_an_exact_index_has_the_losses_gradients_and_scores_them_with_plain_queries(tmp_path: Path):
    train, queries = rows_of("tokens", N_TRAIN), rows_of("tokens", N_QUERIES, seed=1)
    model = make_model("t5")
    common = {"models": model, "dataset": train, "progress": False}
    built = {
        how: AttributionIndex.build(
            tmp_path / how,
            config=TrakConfig(proj_dim=PROJ_DIM, token_reduction="sum", token_out_to_loss=how, damping=1.0),
            **common,
        )
        for how in ("mean", "exact")
    }
    features = {how: np.array(index.features()["trak_features"][:]) for how, index in built.items()}
    found = {how: index.featurize_queries(queries, progress=False)["trak_features"] for how, index in built.items()}
    np.testing.assert_array_equal(found["exact"], found["mean"])
    assert np.abs(features["exact"] - features["mean"]).max() > 1e-2 * np.abs(features["mean"]).max()
    assert built["exact"].features()["trak_output"][:] == pytest.approx(built["mean"].features()["trak_output"][:], rel=1e-5)
    gram = features["exact"].T.astype(np.float64) @ features["exact"]
    damped = gram + np.trace(gram) / min(features["exact"].shape) * np.eye(PROJ_DIM)
    expected = features["exact"] @ np.linalg.solve(damped, found["exact"].T.astype(np.float64))
    np.testing.assert_allclose(
        built["exact"].score(queries, progress=False), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_settings_that_say_nothing_are_not_written(tmp_path: Path):
    train, queries = rows_of("tokens", N_TRAIN), rows_of("tokens", N_QUERIES, seed=1)
    model = make_model("t5")
    index = AttributionIndex.build(tmp_path, models=model, dataset=train, config=TrakConfig(proj_dim=PROJ_DIM), progress=False)
    scores = index.score(queries, progress=False)
    old = {
        "task": "seq2seq", "proj_dim": PROJ_DIM, "sketch_seed": 0, "projector": "block_count_sketch", "fold": 4, "gradients": "auto",
        "compute_dtype": "float32", "damping": "auto", "features_dtype": "float32", "parameters": None, "text_columns": None,
        "image_column": None, "label_column": None, "max_length": None, "format_version": FORMAT_VERSION,
    }  # fmt: skip
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert written.pop("columns_read") == {"tokens": ["input_ids"], "label": "labels"}
    assert written == old
    member = json.loads((tmp_path / "member_0" / "member.json").read_text())
    assert set(member["identity"]["config"]) == set(old) - {"task", "damping"}
    loaded = AttributionIndex.from_pretrained(tmp_path, models=model)
    np.testing.assert_array_equal(loaded.score(queries, progress=False), scores)


# What a reader sees.


def test_rows_of_every_kind_are_read_as_texts():
    tokenizer = word_tokenizer()

    def text(task: str, row: dict[str, Any], features: Features | None = None, **columns: Any) -> str:
        rows = Dataset.from_list([row], features=features)
        return ExampleReader(rows, language=LanguageRows(task, tokenizer, **columns))[0].text.replace("  ", " ")

    parts = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a b"}]}]
    assert text("causal-lm", {"messages": parts}) == "user: [image] a b"
    chat = [{"role": "user", "content": "a"}]
    assert (
        text("causal-lm", {"prompt": chat, "completion": [{"role": "assistant", "content": "b"}]}) == "user: a → assistant: b"
    )
    assert (
        text("causal-lm", {"input_ids": [0, 7, 8, 9], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 8, 9]})
        == "a → b c"
    )
    assert text("causal-lm", {"prompt": "a", "completion": " b"}) == "a → b"
    assert text("causal-lm", {"input_ids": [7, 8], "completion_mask": [0, 1]}) == "a → b"
    assert text("causal-lm", {"input_ids": [7, 8]}) == "a b"
    assert text("masked-lm", {"input_ids": [7, 2, 9], "labels": [-100, 8, -100]}) == "a [UNK] c → b"
    assert text("seq2seq", {"a": "one", "b": "two"}, text_columns=("a",), label_column="b") == "one → two"
    answers = {"text": ["d e"], "answer_start": [4]}
    assert (
        text("question-answering", {"id": "7", "question": "a", "context": "b c d e", "answers": answers})
        == "a | b c d e → d e"
    )
    assert text("question-answering", {"input_ids": [7, 8, 9], "start_positions": 1, "end_positions": 2}) == "a b c → b c"
    tags = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    assert text("token-classification", {"tokens": ["a", "b"], "ner_tags": [0, 1]}, tags) == "a b/B-PER"
    assert ExampleReader(Dataset.from_dict({"input_ids": [[5]]}), language=LanguageRows("causal-lm"))[0] == Example(
        0, text="tokens 5"
    )
