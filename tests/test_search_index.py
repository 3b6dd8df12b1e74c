"""The approximate search ranks by the scores themselves, keeps to what it was made of, and says what it lacks."""

import sys

import numpy as np
import pytest
from stored_for_tests import draw, store_index

pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install 'hf-trak[search]'")

N, PROJ_DIM, N_QUERY = 600, 16, 12
MEMBERS = [draw(N, PROJ_DIM, seed=seed) for seed in range(2)]
QUERIES = [draw(N_QUERY, PROJ_DIM, seed=10 + seed)[0] for seed in range(2)]


@pytest.fixture
def index(tmp_path):
    return store_index(tmp_path / "index", MEMBERS, shard_rows=256, dtype="float16")


def ask(index, top_k=10, **options):
    return index.attribute_features(QUERIES, top_k, progress=False, **options)


def recall(found, exact):
    return np.mean(
        [
            len(set(a) & set(b)) / len(b)
            for side in ("proponents", "opponents")
            for a, b in zip(found[side][:], exact[side][:], strict=True)
        ]
    )


@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.parametrize("power", [None, 0.0, 1.0])
def test_a_flat_search_finds_what_the_exact_ranking_does(index, damping, power):
    """Of an ensemble, with damping chosen after it was built."""
    search = index.add_search_index(out_to_loss_power=power, progress=False)
    assert (search.index.faiss_index.ntotal, search.index.faiss_index.d) == (N, 2 * PROJ_DIM)
    found, exact = (ask(index, exact=way, damping=damping, out_to_loss_power=power) for way in (False, True))
    assert found.column_names == exact.column_names
    assert found["proponents"][:] == exact["proponents"][:]
    assert found["opponents"][:] == exact["opponents"][:]
    for side in ("proponent_scores", "opponent_scores"):
        np.testing.assert_allclose(found[side][:], exact[side][:], rtol=1e-5)


def test_residual_weighting_changes_queries_alone(index):
    index.add_search_index(progress=False)
    found, exact = (ask(index, exact=way, residual_weighting=True) for way in (False, True))
    assert found["proponents"][:] == exact["proponents"][:] != ask(index)["proponents"][:]


def test_coarser_kinds_find_most_and_all_when_every_cell_is_searched(index):
    exact = ask(index)
    search = index.add_search_index("IVF8,Flat", train_rows=500, progress=False)
    one_cell = recall(ask(index, exact=False), exact)
    search.index.faiss_index.nprobe = 8
    assert 0.1 < one_cell < 1 == recall(ask(index, exact=False), exact)
    index.add_search_index("PQ8x4", progress=False)
    assert 0.2 < recall(ask(index, exact=False), exact) < 1


def test_a_kept_search_index_is_read_again_and_must_be_of_the_same_features(index, tmp_path, monkeypatch):
    file = tmp_path / "search.faiss"
    index.add_search_index(file=file, progress=False)
    expected = ask(index, exact=False)[:]
    with monkeypatch.context() as patch:
        patch.setattr("hf_trak.scoring.search_index.write_vectors", lambda *_: pytest.fail("built again"))
        index.add_search_index(file=file, progress=False)
    assert ask(index, exact=False)[:] == expected
    with pytest.raises(ValueError, match=r"(?s)is a different search index:\n  string_factory: 'Flat' there, 'IVF8,Flat' here"):
        index.add_search_index("IVF8,Flat", file=file, progress=False)
    other = store_index(tmp_path / "other", MEMBERS[:1], shard_rows=256)
    with pytest.raises(ValueError, match="(?s)different search index.*members_sha256"):
        other.add_search_index(file=file, progress=False)
    file.with_name("search.faiss.json").unlink()
    with pytest.raises(FileNotFoundError, match="search.faiss.json is missing beside it"):
        index.add_search_index(file=file, progress=False)


def test_what_a_search_index_cannot_answer_is_refused(index):
    with pytest.raises(ValueError, match=r"there is none: call `index.add_search_index\(\)` first"):
        ask(index, exact=False)
    index.add_search_index(progress=False)
    with pytest.raises(ValueError, match="built with out_to_loss_power 0.5, but 1.0 is requested"):
        ask(index, exact=False, out_to_loss_power=1.0)
    for option in ({"leverage": True}, {"soft_threshold": 3}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` needs the scores of all rows"):
            ask(index, exact=False, **option)


def test_kinds_that_faiss_cannot_build_are_refused(index):
    with pytest.raises(ValueError, match="FAISS knows no index 'nonsense' of 32 numbers: .*could not parse"):
        index.add_search_index("nonsense", progress=False)
    with pytest.raises(ValueError, match="cannot train 'IVF1024,Flat' on 600 rows: .*Ask for fewer cells"):
        index.add_search_index("IVF1024,Flat", progress=False)


def test_more_than_there_are_rows_returns_all(index):
    index.add_search_index(progress=False)
    hits = ask(index, top_k=N + 5, exact=False)
    assert all(sorted(hit["proponents"]) == list(range(N)) for hit in hits)


def test_without_faiss_the_way_out_is_named(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-trak\[search\]'"):
        index.add_search_index(progress=False)
    assert len(ask(index)) == N_QUERY
