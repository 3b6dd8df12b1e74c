"""The loop: batches, memory, interruptions."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_trak.featurize import BatchSize, featurize, featurize_rows, kernel_of
from hf_trak.store import MemberWriter, encode_columns

PROJ_DIM = 4


class CountingFeaturizer:
    """Features that are a known function of the row, and a record of what was asked for."""

    def __init__(self, *, fail_above=None, error=None):
        self.batches = []
        self.fail_above = fail_above
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")

    def __call__(self, rows, ids):
        if self.fail_above is not None and len(ids) > self.fail_above:
            raise self.error
        self.batches.append(list(ids))
        values = torch.tensor(rows["value"]).float()
        return encode_columns(values.unsqueeze(1) + torch.arange(PROJ_DIM), values, values, dtype="float32")


def values(n_rows):
    return Dataset.from_dict({"value": list(range(100, 100 + n_rows))})


def run(tmp_path, featurizer, n_rows=23, **options):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=n_rows, shard_rows=10)
    featurize(featurizer, values(n_rows), writer, progress=False, **options)
    return writer


def test_rows_come_out_in_the_datasets_order_whatever_order_they_are_computed_in(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 50, size=23).tolist()
    featurizer = CountingFeaturizer()
    writer = run(tmp_path, featurizer, lengths=lengths, batch_size=4)
    outputs = torch.cat([writer.read(shard).output for shard in range(3)])
    assert outputs.tolist() == list(range(100, 123))
    for batch in featurizer.batches:
        assert [lengths[row] for row in batch] == sorted((lengths[row] for row in batch), reverse=True)
        assert len({row // 10 for row in batch}) == 1, "a batch never spans two shards"


def test_an_automatic_batch_size_halves_until_it_fits(tmp_path, caplog):
    featurizer = CountingFeaturizer(fail_above=5)
    writer = run(tmp_path, featurizer)
    assert max(len(batch) for batch in featurizer.batches) == 4
    assert sorted(row for batch in featurizer.batches for row in batch) == list(range(23))
    assert torch.cat([writer.read(shard).output for shard in range(3)]).tolist() == list(range(100, 123))
    assert "going on with 4 rows" in caplog.text


def test_a_batch_size_that_was_asked_for_is_not_changed(tmp_path):
    with pytest.raises(MemoryError, match="8 rows at a time; try batch_size='auto'"):
        run(tmp_path, CountingFeaturizer(fail_above=5), batch_size=8)


def test_one_row_that_does_not_fit_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(MemoryError, match="1 rows at a time; try fewer parameters, or shorter inputs"):
        run(tmp_path, CountingFeaturizer(fail_above=0))


def test_an_error_that_is_not_about_memory_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path, CountingFeaturizer(fail_above=5, error=RuntimeError("shapes cannot be multiplied")))


@pytest.mark.parametrize("wrong", [0, -1, "large", 2.5])
def test_an_impossible_batch_size_is_refused(wrong):
    with pytest.raises(ValueError, match="`batch_size` must be 'auto' or at least 1"):
        BatchSize(wrong)


def test_finished_shards_are_not_computed_again_after_an_interruption(tmp_path, capsys):
    class Interrupted(CountingFeaturizer):
        def __call__(self, rows, ids):
            if ids[0] >= 10:
                raise KeyboardInterrupt
            return super().__call__(rows, ids)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted(), batch_size=5)
    assert "1 of 3 shards are finished. Run the same again to go on." in capsys.readouterr().out
    again = CountingFeaturizer()
    run(tmp_path, again, batch_size=5)
    assert sorted(row for batch in again.batches for row in batch) == list(range(10, 23))


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    whole = run(tmp_path / "whole", CountingFeaturizer(), batch_size=5)
    writer = MemberWriter(tmp_path / "parts" / "m", identity={}, n_rows=23, shard_rows=10)
    for shards in ([2], [0], [1]):
        featurize(CountingFeaturizer(), values(23), writer, shards=shards, batch_size=5, progress=False)
    for shard in range(3):
        assert writer.path(shard).read_bytes() == whole.path(shard).read_bytes()
    assert torch.equal(kernel_of(writer, proj_dim=PROJ_DIM), kernel_of(whole, proj_dim=PROJ_DIM))


def test_the_kernel_is_the_sum_over_all_stored_rows(tmp_path):
    writer = run(tmp_path, CountingFeaturizer())
    features = torch.cat([writer.read(shard).features for shard in range(3)]).double()
    torch.testing.assert_close(kernel_of(writer, proj_dim=PROJ_DIM), features.T @ features)


def test_progress_counts_rows(tmp_path, capsys):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=23, shard_rows=10)
    featurize(CountingFeaturizer(), values(23), writer)
    err = capsys.readouterr().err
    assert "23/23" in err
    assert "rows/s" in err


def test_rows_of_a_middle_range_keep_their_places():
    columns = featurize_rows(
        CountingFeaturizer(), values(23), range(7, 12), lengths=None, batch_size=BatchSize(2), on_batch=lambda _: None
    )
    assert columns["trak_output"].tolist() == [107, 108, 109, 110, 111]
