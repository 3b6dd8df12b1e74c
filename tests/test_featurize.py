"""The loop: batches, memory, threads, interruptions."""

import re
import signal
import threading
import time

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_trak.featurizing.batching import BatchSize, Budget, ShardBatches
from hf_trak.featurizing.loop import featurize, featurize_ranges, featurize_rows
from hf_trak.gradients import BatchFeatures
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.passes import gram_of
from hf_trak.storage.writer import MemberWriter

PROJ_DIM = 4
LENGTHS = np.random.default_rng(0).integers(1, 50, size=23).tolist()


class CountingFeaturizer:
    """Features that are a known function of the row, and a record of what was asked for."""

    budget = Budget(rows=32, tokens=100)

    def __init__(self, *, lengths=None, fail_above=None, error=None):
        self.batches = []
        self.all_lengths = lengths
        self.fail_above = fail_above
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")

    def lengths(self, dataset):
        return None if self.all_lengths is None else [self.all_lengths[value - 100] for value in dataset["value"]]

    def collate(self, rows):
        return torch.tensor(rows["value"]).float()

    def compute(self, batch, ids):
        assert batch.tolist() == [100 + row for row in ids]
        if self.fail_above is not None and len(ids) > self.fail_above:
            raise self.error
        self.batches.append(list(ids))
        return BatchFeatures(batch, batch, batch.unsqueeze(1) + torch.arange(PROJ_DIM))

    def encode(self, features):
        return encode_columns(features.features, features.output, features.out_to_loss, dtype="float32")


class Failing(CountingFeaturizer):
    """Raises an error in one of its steps, at the rows of the second shard."""

    def __init__(self, step, error):
        super().__init__()
        self.step = step
        self.raised = error

    def _maybe(self, step, first):
        if step == self.step and first >= 110:
            raise self.raised

    def lengths(self, dataset):
        self._maybe("lengths", dataset["value"][0])
        return super().lengths(dataset)

    def collate(self, rows):
        self._maybe("collate", rows["value"][0])
        return super().collate(rows)

    def compute(self, batch, ids):
        self._maybe("compute", batch[0])
        return super().compute(batch, ids)

    def encode(self, features):
        self._maybe("encode", features.output[0])
        return super().encode(features)


def test_the_bar_of_a_long_job_shows_speed_time_left_and_memory(tmp_path, capsys):
    featurize(
        CountingFeaturizer(), values(23), MemberWriter(tmp_path / "m", identity={}, n_rows=23, shard_rows=10), progress=True
    )
    shown = capsys.readouterr().err
    assert re.search(r"23/23 \[\d\d:\d\d<\d\d:\d\d, .*rows/s, \d+\.\d GiB\]", shown)


def threads_of_the_loop():
    """tqdm has a thread of its own, which outlives a run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hf_trak-")]


def values(n_rows):
    return Dataset.from_dict({"value": list(range(100, 100 + n_rows))})


def run(tmp_path, featurizer, n_rows=23, **options):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=n_rows, shard_rows=10)
    featurize(featurizer, values(n_rows), writer, progress=False, **options)
    return writer


def outputs(writer):
    return torch.cat([writer.read(shard).output for shard in range(3)]).tolist()


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_rows_come_out_in_the_datasets_order_whatever_order_they_are_computed_in(tmp_path, batch_size):
    featurizer = CountingFeaturizer(lengths=LENGTHS)
    assert outputs(run(tmp_path, featurizer, batch_size=batch_size)) == list(range(100, 123))
    assert sorted(row for batch in featurizer.batches for row in batch) == list(range(23))
    for batch in featurizer.batches:
        assert [LENGTHS[row] for row in batch] == sorted((LENGTHS[row] for row in batch), reverse=True)
        assert len({row // 10 for row in batch}) == 1, "a batch never spans two shards"


def test_an_automatic_batch_holds_as_many_rows_as_its_tokens_allow():
    lengths = [90, 60, 50, 50, 30, 30, 30, 10, *[2] * 12, 250]
    shard = ShardBatches(range(100, 121), lengths, BatchSize("auto", automatic=Budget(rows=8, tokens=100)))
    batches = [[lengths[row - 100] for row in batch] for batch in shard.batches()]
    assert batches == [[2] * 5, [250], [90], [60], [50, 50], [30, 30, 30], [10, *[2] * 7]], "the shortest, then the longest"


def test_rows_that_are_all_alike_are_counted_alone():
    shard = ShardBatches(range(20, 40), None, BatchSize("auto", automatic=Budget(rows=8, tokens=4)))
    assert shard.batches() == [list(range(20, 28)), list(range(28, 36)), list(range(36, 40))]


@pytest.mark.parametrize(
    ("lengths", "first"), [(None, [0, 1, 2, 3]), (list(range(1, 21)), [3, 2, 1, 0]), ([9] * 20, [16, 17, 18, 19])]
)
def test_a_run_begins_with_four_rows_by_themselves(lengths, first):
    size = BatchSize("auto", automatic=Budget(rows=8))
    begins = ShardBatches(range(20), lengths, size).batches()
    assert begins[0] == first, "the shortest, where they differ"
    assert sorted(row for batch in begins for row in batch) == list(range(20))
    assert [len(batch) for batch in begins] == [4, 8, 8]
    assert len(ShardBatches(range(8), lengths, size).batches()) == 1, "but not where all rows make one batch"


def test_a_number_of_rows_is_kept_whatever_their_lengths():
    shard = ShardBatches(range(23), LENGTHS, BatchSize(5, automatic=Budget(rows=8, tokens=4)))
    assert [len(batch) for batch in shard.batches()] == [3, 5, 5, 5, 5]


def test_an_automatic_batch_size_halves_until_it_fits(tmp_path, caplog):
    featurizer = CountingFeaturizer(fail_above=4)
    assert outputs(run(tmp_path, featurizer)) == list(range(100, 123))
    assert [len(batch) for batch in featurizer.batches] == [3, 2, 3, 2, 3, 2, 3, 2, 3]
    assert sorted(row for batch in featurizer.batches for row in batch) == list(range(23))
    assert "Out of memory with 10 rows at a time: going on with smaller batches." in caplog.text


def test_what_did_not_fit_is_not_tried_again_in_the_same_shard():
    class Failures(CountingFeaturizer):
        tried = 0

        def compute(self, batch, ids):
            self.tried += len(ids) > 4
            return super().compute(batch, ids)

    featurizer = Failures(lengths=[10] * 23, fail_above=4)
    featurize_rows(featurizer, values(23), range(23))
    assert featurizer.tried == 2  # 10 rows, then 5
    assert [len(batch) for batch in featurizer.batches] == [3, 3, 2, 3, 2, 3, 2, 3, 2]


def test_batches_do_not_depend_on_which_shards_a_process_computed_before(tmp_path):
    whole = CountingFeaturizer(lengths=LENGTHS, fail_above=2)
    run(tmp_path / "whole", whole)
    for shard in range(3):
        alone = CountingFeaturizer(lengths=LENGTHS, fail_above=2)
        run(tmp_path / f"{shard}", alone, shards=[shard])
        assert alone.batches == [batch for batch in whole.batches if batch[0] // 10 == shard]


def test_a_batch_size_that_was_asked_for_is_not_changed(tmp_path):
    with pytest.raises(MemoryError, match="8 rows at a time; try batch_size='auto'"):
        run(tmp_path, CountingFeaturizer(fail_above=5), batch_size=8)


def test_one_row_that_does_not_fit_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(MemoryError, match="1 rows at a time; try fewer parameters, or shorter inputs"):
        run(tmp_path, CountingFeaturizer(fail_above=0))


def test_an_error_that_is_not_about_memory_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(tmp_path, CountingFeaturizer(fail_above=5, error=RuntimeError("shapes cannot be multiplied")))


@pytest.mark.parametrize("wrong", [0, -1, "large", 2.5, True])
def test_an_impossible_batch_size_is_refused(wrong):
    with pytest.raises(ValueError, match="`batch_size` must be 'auto' or at least 1"):
        BatchSize(wrong, automatic=Budget(rows=8))


@pytest.mark.parametrize("step", ["lengths", "collate", "compute", "encode"])
def test_an_error_in_any_step_is_raised_as_it_is_and_leaves_whole_shards_and_no_thread(tmp_path, step):
    error = ValueError("row 12 is a teapot")
    with pytest.raises(ValueError, match="row 12 is a teapot") as raised:
        run(tmp_path, Failing(step, error), batch_size=5)
    assert error in (raised.value, raised.value.__cause__)
    assert threads_of_the_loop() == []
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=23, shard_rows=10)
    assert writer.missing() == [1, 2]
    assert not list((tmp_path / "m").glob(".*.tmp"))
    assert outputs(run(tmp_path, CountingFeaturizer(), batch_size=5)) == list(range(100, 123))


def test_an_error_in_writing_is_not_lost_when_computing_fails_too(tmp_path):
    class Both(Failing):
        def encode(self, features):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as raised:
        run(tmp_path, Both("compute", ValueError("row 12 is a teapot")))
    assert "row 12 is a teapot" in str(raised.value.__context__)


def test_the_next_batches_are_read_and_the_last_shard_is_written_meanwhile(tmp_path):
    steps = []

    class Recorded(CountingFeaturizer):
        def collate(self, rows):
            steps.append(("collate", threading.current_thread().name.split("_")[1]))
            return super().collate(rows)

        def compute(self, batch, ids):
            time.sleep(0.05)
            steps.append(("compute", threading.current_thread()))
            return super().compute(batch, ids)

        def encode(self, features):
            time.sleep(0.08)
            steps.append(("encode", threading.current_thread().name.split("_")[1]))
            return super().encode(features)

    run(tmp_path, Recorded(), batch_size=5)
    names = [name for name, _ in steps]
    assert names.index("compute") >= 2, "two batches wait while the first is computed"
    assert names[: names.index("encode")].count("compute") > 2, "a shard of two batches is encoded while the next is computed"
    assert {thread for name, thread in steps if name == "compute"} == {threading.main_thread()}
    assert {thread[:13] for name, thread in steps if name == "collate"} == {"trak-reader"}
    assert {thread[:13] for name, thread in steps if name == "encode"} == {"trak-writer"}


def test_reading_stays_two_batches_ahead_and_no_more():
    read = []

    class Reading(CountingFeaturizer):
        def collate(self, rows):
            read.append(rows["value"][0])
            return super().collate(rows)

        def compute(self, batch, ids):
            time.sleep(0.02)
            assert len(read) <= len(self.batches) + 3  # this one, and two that wait
            return super().compute(batch, ids)

    featurize_rows(Reading(), values(23), range(23), batch_size=2)
    assert len(read) == 12


def test_finished_shards_are_not_computed_again_after_an_interruption(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Failing("compute", KeyboardInterrupt()), batch_size=5)
    assert "1 of 3 shards are finished. Run the same again to go on." in capsys.readouterr().out
    again = CountingFeaturizer()
    run(tmp_path, again, batch_size=5)
    assert sorted(row for batch in again.batches for row in batch) == list(range(10, 23))


@pytest.fixture
def ctrl_c():
    """A process started in the background may have been told to ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_a_run_that_waits_for_its_reader(tmp_path, capsys):
    class Slow(CountingFeaturizer):
        def collate(self, rows):
            if rows["value"][0] >= 110:
                signal.raise_signal(signal.SIGINT)  # is handled in the main thread, which waits
                time.sleep(0.2)
            return super().collate(rows)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Slow(), batch_size=5)
    assert "of 3 shards are finished" in capsys.readouterr().out
    assert threads_of_the_loop() == []


def test_closing_early_leaves_no_thread():
    results = featurize_ranges(
        CountingFeaturizer(), values(23), [range(10), range(10, 20)], batch_size=2, on_batch=lambda _: None
    )
    assert next(results).output.tolist() == list(range(100, 110))
    results.close()
    assert threads_of_the_loop() == []


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path):
    whole = run(tmp_path / "whole", CountingFeaturizer(), batch_size=5)
    writer = MemberWriter(tmp_path / "parts" / "m", identity={}, n_rows=23, shard_rows=10)
    for shards in ([2], [0], [1]):
        featurize(CountingFeaturizer(), values(23), writer, shards=shards, batch_size=5, progress=False)
    for shard in range(3):
        assert writer.path(shard).read_bytes() == whole.path(shard).read_bytes()
    assert torch.equal(gram_of(writer, proj_dim=PROJ_DIM), gram_of(whole, proj_dim=PROJ_DIM))


def test_the_gram_is_the_sum_over_all_stored_rows(tmp_path):
    writer = run(tmp_path, CountingFeaturizer())
    features = torch.cat([writer.read(shard).features for shard in range(3)]).double()
    torch.testing.assert_close(gram_of(writer, proj_dim=PROJ_DIM), features.T @ features)


def test_progress_counts_rows(tmp_path, capsys):
    writer = MemberWriter(tmp_path / "m", identity={}, n_rows=23, shard_rows=10)
    featurize(CountingFeaturizer(), values(23), writer)
    err = capsys.readouterr().err
    assert "23/23" in err
    assert "rows/s" in err


def test_lengths_are_asked_for_one_shard_at_a_time(tmp_path):
    asked = []

    class Asked(CountingFeaturizer):
        def lengths(self, dataset):
            asked.append((len(dataset), len(self.batches)))
            return super().lengths(dataset)

    run(tmp_path, Asked(lengths=LENGTHS), batch_size=1)
    assert [n_rows for n_rows, _ in asked] == [10, 10, 3]
    assert asked[0][1] == 0
    assert asked[2][1] >= 15, "the last shard's, when it is nearly its turn"


def test_rows_of_a_middle_range_keep_their_places():
    features = featurize_rows(CountingFeaturizer(), values(23), range(7, 12), batch_size=2)
    assert features.output.tolist() == [107, 108, 109, 110, 111]
