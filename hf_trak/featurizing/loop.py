"""The one loop that runs a featurizer over a dataset, and writes its shards.

Three things go on at a time: one thread reads the next batches, this one computes, and another writes the shard that was finished
last. On a GPU that keeps the device busy. On a CPU there is next to nothing to win or to lose: of MiniLM on QNLI, reading is under 1 %
of the CPU time and writing .2 %. It is done alike there, so that there is one path.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from hf_trak.featurizing.batching import BatchSize, Budget, ShardBatches, collate_rows
from hf_trak.gradients import BatchFeatures
from hf_trak.runtime import Bar, Terminated, ahead, one_thread
from hf_trak.storage.passes import PassWriter
from hf_trak.storage.writer import MemberWriter

if TYPE_CHECKING:
    from datasets import Dataset


class RowFeaturizer(Protocol):
    """What the loop needs of a [`Featurizer`]: its steps, each for the thread that takes it."""

    @property
    def budget(self) -> Budget:
        """What `batch_size="auto"` begins with."""
        ...

    def lengths(self, dataset: Dataset) -> Sequence[int] | None:
        """Return a number per row that grows with its cost. Called by the thread that reads."""
        ...

    def collate(self, rows: dict[str, list[Any]]) -> Any:
        """Return a batch. Called by the thread that reads."""
        ...

    def compute(self, batch: Any, ids: Sequence[int]) -> BatchFeatures:
        """Return the features of a batch on the CPU, or raise an error that names rows by their `ids`."""
        ...

    def encode(self, features: BatchFeatures) -> dict[str, np.ndarray]:
        """Return the columns to be stored. Called by the thread that writes."""
        ...


def featurize_ranges(
    featurizer: RowFeaturizer,
    dataset: Dataset,
    ranges: Sequence[range],
    *,
    batch_size: int | str,
    on_batch: Callable[[int], Any],
) -> Generator[BatchFeatures]:
    """Yield the features of one range of rows after another, each in its rows' order. Close it to stop early."""
    size = BatchSize(batch_size, automatic=featurizer.budget)

    def read() -> Iterator[tuple[ShardBatches, list[int], Any]]:
        for rows in ranges:
            # Lengths of a whole dataset would keep the first row waiting.
            shard = ShardBatches(rows, featurizer.lengths(dataset.select(rows)), size)
            for chosen in shard.batches():
                yield shard, chosen, collate_rows(featurizer.collate, dataset, chosen)

    with one_thread("reader") as reader, closing(ahead(read(), reader)) as batches:

        def collate(rows: list[int]) -> Any:
            # By the thread that reads, too: a tokenizer serves one thread at a time.
            return reader.submit(collate_rows, featurizer.collate, dataset, rows).result()

        whole: BatchFeatures | None = None
        done = 0
        for shard, chosen, batch in batches:
            for rows, part in _compute(featurizer, shard, chosen, batch, collate):
                whole = whole or _room_for(len(shard.rows), part)
                for target, values in zip(whole, part, strict=True):
                    target[[row - shard.rows.start for row in rows]] = values
                done += len(rows)
                on_batch(len(rows))
            if whole is not None and done == len(shard.rows):
                yield whole
                whole, done = None, 0


def _compute(
    featurizer: RowFeaturizer, shard: ShardBatches, rows: list[int], batch: Any, collate: Callable[[list[int]], Any]
) -> Iterator[tuple[list[int], BatchFeatures]]:
    """Yield the features of a batch, in halves of halves where it does not fit into memory."""
    if shard.fits(rows):
        try:
            part = featurizer.compute(batch, rows)
        except (RuntimeError, MemoryError) as error:
            shard.shrink(rows, error)
        else:
            yield rows, part
            return
    half = (len(rows) + 1) // 2
    for piece in (rows[:half], rows[half:]):
        yield from _compute(featurizer, shard, piece, collate(piece), collate)


def _room_for(n_rows: int, part: BatchFeatures) -> BatchFeatures:
    return BatchFeatures(*(torch.empty(n_rows, *values.shape[1:], dtype=values.dtype) for values in part))


def featurize_rows(
    featurizer: RowFeaturizer,
    dataset: Dataset,
    rows: range,
    *,
    batch_size: int | str = "auto",
    on_batch: Callable[[int], Any] = lambda n_rows: None,
) -> BatchFeatures:
    """Return the features of some rows, in their order."""
    with closing(featurize_ranges(featurizer, dataset, [rows], batch_size=batch_size, on_batch=on_batch)) as results:
        return next(results)


def featurize(
    featurizer: RowFeaturizer,
    dataset: Dataset,
    writer: MemberWriter | PassWriter,
    *,
    batch_size: int | str = "auto",
    shards: Sequence[int] | None = None,
    progress: bool = True,
    description: str = "Featurizing",
    speak: bool = True,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Compute and write the shards of `writer` that are missing.

    Each shard is computed from its own rows alone, so that stopping, and going on with any number of processes, gives the same
    bytes.

    Args:
        featurizer ([`Featurizer`]): Its steps are called from several threads, each step from one at a time.
        batch_size (`int` or `"auto"`): Rows at a time; `"auto"` is as many as the featurizer's budget of tokens allows, and fewer
            where memory runs out.
        shards (`Sequence[int]`, *optional*): Only these, where several processes share the work.
        progress (`bool`): Show a bar.
        speak (`bool`): Say what is finished when stopped by Ctrl-C or SIGTERM.
        check (`Callable`): Called after each shard; what it raises ends the loop once that shard is written.
    """
    wanted = range(writer.n_shards) if shards is None else shards
    missing = [shard for shard in writer.missing() if shard in wanted]
    ranges = [writer.rows(shard) for shard in missing]
    total = sum(len(writer.rows(shard)) for shard in wanted)
    with Bar(total=total, initial=total - sum(map(len, ranges)), unit="rows", desc=description, disable=not progress) as bar:
        results = featurize_ranges(featurizer, dataset, ranges, batch_size=batch_size, on_batch=bar.update)
        try:
            with closing(results):
                _write(
                    zip(missing, results, strict=True),
                    lambda shard, values: writer.write(shard, featurizer.encode(values)),
                    check,
                )
        except (KeyboardInterrupt, Terminated):
            bar.close()
            if speak:
                finished = writer.n_shards - len(writer.missing())
                print(f"Stopped: {finished} of {writer.n_shards} shards are finished. Run the same again to go on.")
            raise


def _write(
    shards: Iterable[tuple[int, BatchFeatures]], write: Callable[[int, BatchFeatures], None], check: Callable[[], None]
) -> None:
    """Write one shard while the next is computed. An error of either kind is raised, and never before a begun write has ended."""
    with one_thread("writer") as thread:
        writing: Future[None] | None = None
        try:
            for shard, features in shards:
                if writing is not None:
                    writing.result()
                writing = thread.submit(write, shard, features)
                check()
        finally:
            if writing is not None:
                writing.result()
