"""Indexes of streaming datasets: the same as of the rows they give, and what cannot be read is told."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, config, load_dataset
from models import make_model
from PIL import Image as pillow

from hf_trak import AttributionArguments, AttributionIndex, AttributionTrainer, TrakConfig
from hf_trak.cli.main import main
from hf_trak.sources.streams import read_stream

SETTINGS = TrakConfig(proj_dim=16)


def rows(n_rows):
    for i in range(n_rows):
        yield {"input_ids": [3 + i % 7, 4, 5 + i % 5], "label": i % 3, "name": f"row {i}"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_an_index_of_a_stream_is_that_of_its_rows(tmp_path):
    arguments = {
        "models": make_model("bert", seed=0), "config": SETTINGS, "shard_rows": 5, "keep_columns": ["name"], "progress": False,
    }  # fmt: skip
    stream = IterableDataset.from_generator(rows, gen_kwargs={"n_rows": 40})
    index = AttributionIndex.build(tmp_path / "stream", dataset=stream, n_rows=12, **arguments)
    other = AttributionIndex.build(tmp_path / "rows", dataset=Dataset.from_list(list(rows(12))), **arguments)
    assert index.members[0].info["files"] == other.members[0].info["files"]
    assert index.kept_rows[7] == {"name": "row 7"}
    written = [path.stat().st_mtime_ns for path in index.members[0].shard_paths]
    AttributionIndex.build(tmp_path / "stream", dataset=stream, n_rows=12, **arguments)
    assert written == [path.stat().st_mtime_ns for path in index.members[0].shard_paths]
    with pytest.raises(ValueError, match="sha256"):
        AttributionIndex.build(tmp_path / "stream", dataset=stream.skip(1), n_rows=12, **arguments)
    assert AttributionIndex.estimate(models=arguments["models"], dataset=stream, n_rows=12, config=SETTINGS).n_rows == 12
    AttributionIndex.build_shards(tmp_path / "jobs", shard_index=0, num_shards=1, dataset=stream, n_rows=12, **arguments)
    assert AttributionIndex.merge(tmp_path / "jobs").members[0].info["files"] == index.members[0].info["files"]


def test_queries_may_be_a_stream(tmp_path):
    index = AttributionIndex.build(
        tmp_path / "index",
        models=make_model("bert", seed=0),
        config=SETTINGS,
        dataset=Dataset.from_list(list(rows(9))),
        progress=False,
    )
    stream, stored = IterableDataset.from_generator(rows, gen_kwargs={"n_rows": 40}).take(3), Dataset.from_list(list(rows(3)))
    for ask in (index.score, lambda *given, **more: index.attribute(*given, **more).to_dict(), index.featurize_queries):
        np.testing.assert_equal(ask(stream, progress=False), ask(stored, progress=False))
    assert index.label_errors(stream).to_dict() == index.label_errors(stored).to_dict()
    assert index.select(stream, 2, progress=False).to_dict() == index.select(stored, 2, progress=False).to_dict()


@pytest.mark.parametrize("n_rows", [None, 5])
def test_a_trainer_attributes_to_the_rows_that_it_reads_of_a_stream(tmp_path, caplog, n_rows):
    def make_trainer(folder, train, **given):
        args = AttributionArguments(
            folder, max_steps=2, per_device_train_batch_size=4, proj_dim=16, keep_columns=["name"], report_to="none", use_cpu=True,
            disable_tqdm=True, seed=1, **given,
        )  # fmt: skip
        return AttributionTrainer(make_model("bert", seed=0), args, train_dataset=train)

    stream = IterableDataset.from_generator(rows, gen_kwargs={"n_rows": 40})
    trainer = make_trainer(tmp_path / "stream", stream, n_rows=n_rows)
    trainer.train()
    index = trainer.featurize()
    assert index.kept_rows.take(range(index.n_rows))["name"][:] == [f"row {i}" for i in range(n_rows or 8)]
    assert ("of which the first 5 are attributed to" in caplog.text) == (n_rows == 5)
    again = make_trainer(tmp_path / "stream", stream, n_rows=n_rows)  # after training, in a process of its own
    written = [path.stat().st_mtime_ns for path in index.members[0].shard_paths]
    assert (
        again.attribute(stream.take(2), top_k=2)["proponents"][:] == trainer.attribute(stream.take(2), top_k=2)["proponents"][:]
    )
    assert written == [path.stat().st_mtime_ns for path in index.members[0].shard_paths]
    others = trainer.featurize(stream.skip(8), n_rows=3, overwrite=True)
    assert others.kept_rows[0] == {"name": "row 8"}


def test_types_and_pictures_come_through_undecoded(tmp_path):
    files = []
    for i in range(3):
        pillow.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    features = Features({"image": Image(), "label": ClassLabel(names=["no", "yes"]), "size": Value("float32")})
    plain = Dataset.from_dict({"image": files, "label": [0, 1, 1], "size": [0.5, 1.5, 2.5]}, features=features)
    plain.to_parquet(tmp_path / "rows.parquet")
    stream = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True)
    found = read_stream(stream)
    assert found.features == features
    assert found.split == "train"
    assert np.array(found[2]["image"]).max() == 80
    assert found["label"][:] == [0, 1, 1]


def test_what_killed_processes_left_is_removed(cache):
    gone = cache / "hf_trak-stream-999999999-x"  # no process has such a number
    gone.mkdir(parents=True)
    found = read_stream(IterableDataset.from_generator(rows, gen_kwargs={"n_rows": 2}))
    assert [path.name for path in cache.glob("hf_trak-stream-*")] == [found.cache_files[0]["filename"].split("/")[-2]]


@pytest.mark.slow
def test_the_rows_are_removed_when_the_process_ends(cache):
    code = (
        "from datasets import IterableDataset; from hf_trak.sources.streams import read_stream; "
        "found = read_stream(IterableDataset.from_generator(lambda: iter([{'a': 1}]))); print(found[0], found.cache_files[0]['filename'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )
    assert result.stdout.startswith(f"{{'a': 1}} {cache}/hf_trak-stream-")
    assert not list(cache.glob("hf_trak-stream-*"))


@pytest.mark.parametrize(("stream", "n_rows", "message"), [
    (lambda: iter(list(rows(3))), 5, "n_rows=5 were to be read, but the stream ends after 3"),
    (lambda: iter(()), None, "The stream has no rows"),
    (lambda: iter([{"a": 1}, {"a": 1, "b": 2}]), None, "Row 1 of the stream has the columns a, b, but the rows before it a"),
    (lambda: iter([{"a": 1}, {"a": [1]}]), None, "other types than the rows before it"),
    (lambda: iter(list(rows(3))), 0, "`n_rows` must be a whole number of at least 1, but is 0"),
])  # fmt: skip
def test_streams_that_cannot_be_read_are_refused(stream, n_rows, message):
    with pytest.raises(ValueError, match=message):
        read_stream(IterableDataset.from_generator(stream), n_rows)


def test_the_command_line_reads_no_further_than_it_must(tmp_path, capsys):
    make_model("bert", seed=0).save_pretrained(tmp_path / "model")
    Dataset.from_list(list(rows(30))).to_parquet(tmp_path / "train.parquet")
    flags = [
        "featurize",
        "--model",
        str(tmp_path / "model"),
        "--dataset",
        str(tmp_path / "train.parquet"),
        "--stream",
        "--proj_dim",
        "16",
    ]
    main([*flags, "--max_rows", "7", "--output", str(tmp_path / "index")])
    assert "7 rows, 1 member" in capsys.readouterr().out
    assert main([*flags, "--split", "train[:5]", "--output", str(tmp_path / "other")]) == 1
    assert "Use --max_rows for the first rows" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`n_rows` is for streaming datasets"):
        read_stream(Dataset.from_list(list(rows(3))), 2)
