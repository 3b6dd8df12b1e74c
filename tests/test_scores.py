"""Scores of an index's rows: streamed by row groups, within a given memory, shared by processes, and always the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets_for_tests import save_model, token_rows
from reference import scaled_scores
from stored_for_tests import draw, store_index

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.scoring import scorer
from hf_trak.scoring.ensemble import ScoreOptions, solve_all
from hf_trak.scoring.memory import DEFAULT_MEMORY, ScoringMemory, parse_memory
from hf_trak.scoring.scorer import Scorer
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.reader import block_size, member_blocks, read_blocks

N, PROJ_DIM, N_QUERY = 300, 24, 7
MEMBERS = [draw(N, PROJ_DIM, seed=seed) for seed in range(2)]
QUERIES = [draw(N_QUERY, PROJ_DIM, seed=10 + seed)[0] for seed in range(2)]


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch):
    """Some 20 rows each."""
    monkeypatch.setattr("hf_trak.storage.writer._ROW_GROUP_BYTES", 20 * 4 * PROJ_DIM)


@pytest.fixture
def index(tmp_path):
    return store_index(tmp_path / "index", MEMBERS, shard_rows=64)


def expected_scores(damping=3.0):
    return scaled_scores([f for f, _ in MEMBERS], QUERIES, [q for _, q in MEMBERS], damping, 0.5)


def matrix(index, output_file=None, **options):
    settings = {"damping": 3.0, "out_to_loss_power": 0.5}
    options = ScoreOptions(**{**settings, **options})
    solved = solve_all(index.members, [torch.from_numpy(q) for q in QUERIES], options)
    return Scorer(index.members, options, N_QUERY, progress=False).matrix(lambda: solved, output_file)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_are_the_shards_row_group_by_row_group(tmp_path, dtype):
    member = store_index(tmp_path, MEMBERS[:1], shard_rows=64, dtype=dtype).members[0]
    blocks, shards = list(member_blocks(member)), list(member.shards())
    assert len(blocks) > 2 * len(shards)
    assert max(len(block.example_id) for block in blocks) == block_size(member).rows < 30
    for name in ("example_id", "features", "out_to_loss", "output"):
        whole = torch.cat([getattr(shard, name) for shard in shards])
        assert torch.equal(torch.cat([getattr(block, name) for block in blocks]), whole.to(getattr(blocks[0], name).dtype))


def test_a_flipped_bit_is_found_while_rows_stream(index):
    path = index.members[0].shard_paths[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train-00001-of-00005.parquet is damaged"):
        index.attribute_features(QUERIES, progress=False)
    with pytest.raises(ValueError, match="damaged"):
        list(read_blocks(path))


def test_features_made_elsewhere_rank_as_the_equation_says(index):
    expected = expected_scores()
    hits = index.attribute_features(QUERIES, top_k=9, progress=False)
    assert hits.column_names == ["query_id", "proponents", "proponent_scores", "opponents", "opponent_scores"]
    scores = matrix(index)
    assert np.isfinite(scores).all()
    assert np.abs(scores - expected).max() < 2e-6 * expected.std()
    for query, hit in enumerate(hits):
        order = np.argsort(-scores[:, query], kind="stable")
        assert hit["proponents"] == order[:9].tolist()
        assert hit["opponents"] == np.argsort(scores[:, query], kind="stable")[:9].tolist()
        np.testing.assert_array_equal(np.float32(hit["proponent_scores"]), scores[order[:9], query])


def test_neither_reading_ahead_nor_memory_nor_shards_change_a_bit(index, tmp_path):
    expected = index.attribute_features(QUERIES, top_k=50, progress=False)[:]
    least = Scorer(index.members, ScoreOptions(3.0), N_QUERY, top_k=50)._memory.least
    for max_memory in (least, str(10 * least), "3GB"):
        assert index.attribute_features(QUERIES, top_k=50, max_memory=max_memory, progress=False)[:] == expected
    whole = store_index(tmp_path / "one", MEMBERS, shard_rows=N)
    found = whole.attribute_features(QUERIES, top_k=50, progress=False)[:]
    assert found["proponents"] == expected["proponents"]


def test_too_little_memory_is_refused_with_the_least_that_works(index):
    least = Scorer(index.members, ScoreOptions(3.0), N_QUERY, top_k=10)._memory.least
    with pytest.raises(
        ValueError, match=r"max_memory is .*, but scoring takes at least .*features of 7 queries.*24.*fewer queries"
    ):
        index.attribute_features(QUERIES, max_memory=least - 1, progress=False)
    assert len(index.attribute_features(QUERIES, max_memory=least, progress=False)) == N_QUERY


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (12345, 12345), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("64mb", 64 * 10**6), ("700", 700)],
)
def test_memory_is_given_in_bytes_or_with_a_unit(given, expected):
    assert parse_memory(given) == expected


@pytest.mark.parametrize("given", ["", "2 gigs", "-1GB", 0, "0GB", True, "GB", float("nan")])
def test_what_is_no_amount_of_memory_is_refused(given):
    with pytest.raises(ValueError, match="`max_memory` must be a number of bytes"):
        parse_memory(given)


def test_by_default_there_is_as_much_memory_as_it_takes():
    small = ScoringMemory(block_rows=10, block_bytes=1000, proj_dim=8, n_members=1, n_rows=100, n_query=3, top_k=5)
    assert small.fit(None) == DEFAULT_MEMORY
    large = ScoringMemory(block_rows=10, block_bytes=1000, proj_dim=1 << 15, n_members=1, n_rows=100, n_query=3, top_k=5)
    assert large.fit(None) == large.least > DEFAULT_MEMORY


def test_a_matrix_above_the_given_memory_is_mapped(index, monkeypatch):
    options = ScoreOptions(3.0, out_to_loss_power=0.5, soft_threshold=11)
    solved = solve_all(index.members, [torch.from_numpy(q) for q in QUERIES], options)
    scorer = Scorer(index.members, options, N_QUERY, max_memory="1GB", progress=False)
    expected = scorer.matrix(lambda: solved)
    assert not isinstance(expected, np.memmap)
    tight = Scorer(index.members, options, N_QUERY, max_memory=scorer._memory.least, progress=False)
    found = tight.matrix(lambda: solved)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, expected)
    assert ((found != 0).sum(0) == 11).all()


def test_the_columns_of_a_dataset_serve_as_features(index):
    expected = index.attribute_features(QUERIES, progress=False)
    output = torch.arange(N_QUERY).float()
    for dtype in ("float32", "float16"):
        rows = [
            Dataset.from_dict(
                {k: v.tolist() for k, v in encode_columns(torch.from_numpy(q), output, output, dtype=dtype).items()}
            )
            for q in QUERIES
        ]
        hits = index.attribute_features(rows, progress=False)
        assert hits["query_output"][:] == output.tolist()
        assert hits["proponents"][:] == expected["proponents"][:]


def test_unusable_query_features_are_refused(index):
    with pytest.raises(ValueError, match="index has 2 members, but features of 1 were given"):
        index.attribute_features(QUERIES[0])
    with pytest.raises(ValueError, match=r"member 1 must have the shape \(7, 24\), but have \(7, 23\)"):
        index.attribute_features([QUERIES[0], QUERIES[1][:, 1:]])
    broken = QUERIES[1].copy()
    broken[[2, 5], 3] = np.nan
    with pytest.raises(ValueError, match="member 1 hold NaN or infinity in rows 2, 5, 2 in all"):
        index.attribute_features([QUERIES[0], broken])
    with pytest.raises(ValueError, match="There are no queries"):
        index.attribute_features([q[:0] for q in QUERIES])
    with pytest.raises(ValueError, match="no column trak_features; they have label"):
        index.attribute_features([Dataset.from_dict({"label": [1]})] * 2)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, but is 0"):
        index.attribute_features(QUERIES, top_k=0)


def test_more_than_there_is_and_a_query_of_zeros_are_answered(index):
    queries = [q.copy() for q in QUERIES]
    for one in queries:
        one[3] = 0
    hits = index.attribute_features(queries, top_k=N + 5, progress=False)
    assert all(sorted(hit["proponents"]) == list(range(N)) for hit in hits)
    assert hits[3]["proponents"] == list(range(N))
    assert set(hits[3]["proponent_scores"]) == {0.0}


def test_mapped_features_of_queries_score_as_the_queries_do(tmp_path):
    model = save_model(tmp_path / "bert")
    index = AttributionIndex.build(
        tmp_path / "index", models=model, dataset=token_rows(30), config=TrakConfig(proj_dim=16), progress=False
    )
    queries = token_rows(4, seed=1)
    mapped = queries.map(index.featurizer(), batched=True, batch_size=4)
    found, expected = index.attribute_features(mapped, progress=False)[:], index.attribute(queries, progress=False)[:]
    assert found["proponents"] == expected["proponents"]
    np.testing.assert_allclose(found["proponent_scores"], expected["proponent_scores"], rtol=1e-4, atol=1e-7)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {tests!r})
import numpy as np, torch
from hf_trak.cli.main import main
from hf_trak.distributed import rank_and_size
folder = Path({folder!r})
where = ["--index", {cli!r}, "--queries", {queries!r}, "--output", str(folder / "hits.jsonl")]
code = main(["attribute", *where, "--top_k", "9", "--max_memory", "1GB"])
rank, size = rank_and_size()
assert (code, size) == (0, 2), (code, size)
from test_scores import QUERIES, matrix
from hf_trak import AttributionIndex
found = {{}}
for name in ("many", "one"):
    index = AttributionIndex.from_pretrained(folder / name)
    for threshold in (None, 5):
        found[f"{{name}} {{threshold}}"] = index.attribute_features(QUERIES, 40, soft_threshold=threshold, progress=False)[:]
matrix(AttributionIndex.from_pretrained(folder / "many"), folder / "scores.npy")
(folder / f"rank{{rank}}.json").write_text(json.dumps(found))
"""


def test_two_processes_rank_to_the_same_bits_as_one(tmp_path):
    """Through the CLI too; with more processes than shards; and they fill one matrix together."""
    many = store_index(tmp_path / "many", MEMBERS, shard_rows=64)
    one = store_index(tmp_path / "one", MEMBERS, shard_rows=N)
    queries = token_rows(5, seed=1)
    queries.to_parquet(tmp_path / "queries.parquet")
    model = save_model(tmp_path / "bert")
    cli = AttributionIndex.build(
        tmp_path / "cli", models=model, dataset=token_rows(50), config=TrakConfig(proj_dim=16), shard_rows=16, progress=False
    )
    code = TWO_PROCESSES.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), cli=str(cli.folder), queries=str(tmp_path / "queries.parquet")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert ["Hits of 5 queries" in text for text in printed] == [True, False]
    expected = {
        f"{name} {threshold}": index.attribute_features(QUERIES, 40, soft_threshold=threshold, progress=False)[:]
        for name, index in (("many", many), ("one", one))
        for threshold in (None, 5)
    }
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == expected
    assert np.array_equal(np.load(tmp_path / "scores.npy"), matrix(many))
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert hits == list(cli.attribute(queries, 9, progress=False))


class Stopped(Exception):
    pass


@pytest.fixture
def counted(monkeypatch):
    """Count the row groups that are scored, and stop after a number of them."""
    found = SimpleNamespace(blocks=0, at_most=10**6)
    stream = scorer.stream_scores

    def counting(*args, **options):
        for block in stream(*args, **options):
            if found.blocks == found.at_most:
                raise Stopped
            found.blocks += 1
            yield block

    monkeypatch.setattr(scorer, "stream_scores", counting)
    monkeypatch.setattr(scorer, "_RECORD_SECONDS", 0.0)
    return found


def test_scores_that_were_stopped_go_on_with_the_same_bytes(index, tmp_path, counted):
    expected = np.array(matrix(index))
    whole, counted.blocks, counted.at_most = counted.blocks, 0, 9
    with pytest.raises(Stopped):
        matrix(index, tmp_path / "scores.npy")
    assert not (tmp_path / "scores.npy").exists()
    counted.blocks, counted.at_most = 0, 10**6
    np.testing.assert_array_equal(matrix(index, tmp_path / "scores.npy"), expected)
    assert 0 < counted.blocks < whole
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("options", [{"damping": 0.5}, {"out_to_loss_power": 1.0}, {"leverage": True}])
def test_stopped_scores_of_something_else_are_made_anew(index, tmp_path, counted, options):
    expected = np.array(matrix(index, **options))
    whole, counted.blocks, counted.at_most = counted.blocks, 0, 9
    with pytest.raises(Stopped):
        matrix(index, tmp_path / "scores.npy")
    counted.blocks, counted.at_most = 0, 10**6
    np.testing.assert_array_equal(matrix(index, tmp_path / "scores.npy", **options), expected)
    assert counted.blocks == whole
    assert len(list(tmp_path.iterdir())) == 2


def test_a_threshold_that_was_stopped_begins_with_the_scores(index, tmp_path, counted, monkeypatch):
    options = ScoreOptions(damping=3.0, out_to_loss_power=0.5, soft_threshold=20)
    solved = solve_all(index.members, [torch.from_numpy(q) for q in QUERIES], options)
    make = Scorer(index.members, options, N_QUERY, progress=False)
    expected = np.array(make.matrix(lambda: solved))
    threshold = scorer.soft_threshold_in_place

    def half(scores, keep, **more):
        scores[:, :3] = 0
        raise Stopped

    monkeypatch.setattr(scorer, "soft_threshold_in_place", half)
    with pytest.raises(Stopped):
        make.matrix(lambda: solved, tmp_path / "scores.npy")
    monkeypatch.setattr(scorer, "soft_threshold_in_place", threshold)
    np.testing.assert_array_equal(make.matrix(lambda: solved, tmp_path / "scores.npy"), expected)


def test_a_killed_process_leaves_scores_that_another_goes_on_with(index, tmp_path, counted):
    expected = np.array(matrix(index))
    whole, counted.blocks, counted.at_most = counted.blocks, 0, 9
    with pytest.raises(Stopped):
        matrix(index, tmp_path / "scores.npy")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for left in tmp_path.glob(".scores.npy*"):
        left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", f".{ended.pid}.")))
    counted.blocks, counted.at_most = 0, 10**6
    np.testing.assert_array_equal(matrix(index, tmp_path / "scores.npy"), expected)
    assert 0 < counted.blocks < whole
    assert len(list(tmp_path.iterdir())) == 2
