"""`hf-trak attribute` in blocks of queries: the same hits as in one, kept when a run is stopped, and removed when it is done."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import load_dataset
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.cli import hit_blocks
from hf_trak.cli.attribute import most_bytes
from hf_trak.cli.hit_blocks import HitBlocks
from hf_trak.cli.main import main

N_QUERIES = 8


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    rows = token_rows(20).add_column("note", [f"{i:02d} " * 300 for i in range(20)])
    model = save_model(folder / "bert")
    options = {"config": TrakConfig(proj_dim=8), "shard_rows": 8, "progress": False}
    return AttributionIndex.build(folder / "index", models=model, dataset=rows, keep_columns=["note"], **options)


@pytest.fixture
def asked(built, tmp_path, monkeypatch):
    """Return what runs the command, and the queries of each call of the index."""
    monkeypatch.setattr(hit_blocks, "BLOCK_QUERIES", 3)
    token_rows(N_QUERIES, seed=1).to_parquet(str(tmp_path / "queries.parquet"))
    attribute, calls, stop = AttributionIndex.attribute, [], []

    def counting(self, queries, *args, **options):
        if stop and len(calls) == stop[0]:
            raise KeyboardInterrupt
        calls.append(len(queries))
        return attribute(self, queries, *args, **options)

    monkeypatch.setattr(AttributionIndex, "attribute", counting)

    def run(*flags, stop_after=None):
        calls.clear()
        stop[:] = [] if stop_after is None else [stop_after]
        given = ["--index", str(built.folder), "--queries", str(tmp_path / "queries.parquet"), "--split", "train"]
        return main(["attribute", *given, "--output", str(tmp_path / "hits.parquet"), *flags]), list(calls)

    return run


def read(tmp_path):
    return load_dataset("parquet", data_files=str(tmp_path / "hits.parquet"), split="train")


def check(found, index):
    expected = index.attribute(token_rows(N_QUERIES, seed=1), 4, progress=False)
    assert found.column_names == expected.column_names
    assert found["query_id"][:] == list(range(N_QUERIES))
    for name in ("proponents", "opponents", "proponent_note"):
        assert found[name][:] == expected[name][:]
    np.testing.assert_allclose(found["proponent_scores"], expected["proponent_scores"], rtol=1e-4)


def test_a_run_that_is_stopped_loses_one_block(built, asked, tmp_path, capsys):
    assert asked("--top_k", "4", stop_after=2) == (130, [3, 3])
    assert not (tmp_path / "hits.parquet").exists()
    (tmp_path / ".hits.parquet.blocks" / "thesis.tex").write_text("years of work")
    capsys.readouterr()
    assert asked("--top_k", "4") == (0, [2])
    assert "2 of 3 blocks of 3 queries are done" in capsys.readouterr().err
    check(read(tmp_path), built)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"hits.parquet", "queries.parquet", "thesis.tex"}


@pytest.mark.parametrize("change", ["top_k", "damping", "queries", "damage"])
def test_blocks_of_something_else_are_made_again(built, asked, tmp_path, change):
    first = {"top_k": ["--top_k", "5"], "damping": ["--top_k", "4", "--damping", "9"]}.get(change, ["--top_k", "4"])
    if change == "queries":
        token_rows(N_QUERIES, seed=2).to_parquet(str(tmp_path / "queries.parquet"))
    assert asked(*first, stop_after=1) == (130, [3])
    if change == "queries":
        token_rows(N_QUERIES, seed=1).to_parquet(str(tmp_path / "queries.parquet"))
    if change == "damage":
        path = tmp_path / ".hits.parquet.blocks" / "hits-00000.parquet"
        path.write_bytes(path.read_bytes()[:-30])
    assert asked("--top_k", "4") == (0, [3, 3, 2])
    check(read(tmp_path), built)


def test_the_room_for_hits_counts_kept_columns(built):
    hits = built.attribute(token_rows(N_QUERIES, seed=1), 4, progress=False)
    text = sum(len(note) for notes in hits["proponent_note"][:] + hits["opponent_note"][:] for note in notes)
    kept = built.kept_rows
    assert text > most_bytes(N_QUERIES, 4, 20) - (1 << 16)
    assert text < most_bytes(N_QUERIES, 4, 20, kept=kept.mean_bytes_as_text) - (1 << 16) < 2 * text
    # Parquet's statistics of a shard repeat its least and its greatest value: two notes more to a shard of 8.
    assert text < N_QUERIES * 8 * kept.mean_bytes < 1.3 * text


def test_only_files_of_blocks_are_removed(tmp_path):
    blocks = HitBlocks(tmp_path / "hits.jsonl", {"a": 1})
    blocks.begin()
    (blocks.folder / "thesis.tex").write_text("years of work")
    HitBlocks(tmp_path / "hits.jsonl", {"a": 2}).begin()
    blocks.remove()
    assert [path.name for path in blocks.folder.iterdir()] == ["thesis.tex"]
