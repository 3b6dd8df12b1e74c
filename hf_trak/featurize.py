"""The one loop that runs a featurizer over a dataset, and writes its shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm

from hf_trak.linalg import accumulate_kernel
from hf_trak.passes import PassWriter
from hf_trak.store import MemberWriter

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

AUTO_BATCH_SIZE = 32
FeaturizeRows = Callable[[dict[str, list[Any]], Sequence[int]], dict[str, np.ndarray]]


class BatchSize:
    """A number of rows; one that was not asked for by number halves when memory runs out."""

    def __init__(self, rows: int | str = "auto") -> None:
        if rows != "auto" and (not isinstance(rows, int) or rows < 1):
            raise ValueError(f"`batch_size` must be 'auto' or at least 1, but is {rows!r}.")
        self.may_shrink = rows == "auto"
        self.rows = AUTO_BATCH_SIZE if rows == "auto" else int(rows)

    def shrink(self, error: Exception) -> None:
        """Halve, or raise `error` if it is not about memory or nothing is left to halve."""
        out_of_memory = isinstance(error, MemoryError) or should_reduce_batch_size(error)
        if not out_of_memory:
            raise error
        if self.rows == 1 or not self.may_shrink:
            way_out = "batch_size='auto' or a smaller one" if self.rows > 1 else "fewer parameters, or shorter inputs"
            raise MemoryError(f"Out of memory with {self.rows} rows at a time; try {way_out}.") from error
        self.rows //= 2
        logger.warning("Out of memory: going on with %d rows at a time.", self.rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def featurize_rows(
    featurize: FeaturizeRows,
    dataset: Dataset,
    rows: range,
    *,
    lengths: Sequence[int] | None,
    batch_size: BatchSize,
    on_batch: Callable[[int], Any],
) -> dict[str, np.ndarray]:
    """Return the columns of some rows, in their order. Rows of like length share a batch; the longest come first."""
    order = list(rows) if lengths is None else sorted(rows, key=lambda row: (-lengths[row], row))
    columns: dict[str, np.ndarray] = {}
    done = 0
    while done < len(order):
        chosen = order[done : done + batch_size.rows]
        try:
            values = featurize(dataset[chosen], chosen)
        except (RuntimeError, MemoryError) as error:
            batch_size.shrink(error)
            continue
        for name, value in values.items():
            if name not in columns:
                columns[name] = np.empty((len(rows), *value.shape[1:]), dtype=value.dtype)
            columns[name][[row - rows.start for row in chosen]] = value
        done += len(chosen)
        on_batch(len(chosen))
    return columns


def featurize(
    featurizer: FeaturizeRows,
    dataset: Dataset,
    writer: MemberWriter | PassWriter,
    *,
    lengths: Sequence[int] | None = None,
    batch_size: int | str = "auto",
    shards: Sequence[int] | None = None,
    progress: bool = True,
    description: str = "Featurizing",
) -> None:
    """Compute and write the shards of `writer` that are missing.

    Each shard is computed from its own rows alone, so that stopping, and going on with any number of processes, gives the same
    bytes.

    Args:
        featurizer (`Callable`): `(rows, ids) -> columns`, such as a [`Featurizer`].
        lengths (`Sequence[int]`, *optional*): A number per row that grows with its cost.
        batch_size (`int` or `"auto"`): Rows at a time; `"auto"` halves when memory runs out.
        shards (`Sequence[int]`, *optional*): Only these, where several processes share the work.
    """
    size = BatchSize(batch_size)
    wanted = range(writer.n_shards) if shards is None else shards
    missing = [shard for shard in writer.missing() if shard in wanted]
    done = sum(len(writer.rows(shard)) for shard in wanted if shard not in missing)
    total = sum(len(writer.rows(shard)) for shard in wanted)
    finished = 0
    with tqdm(total=total, initial=done, unit="rows", desc=description, disable=not progress) as bar:
        try:
            for shard in missing:
                rows = writer.rows(shard)
                writer.write(
                    shard,
                    featurize_rows(featurizer, dataset, rows, lengths=lengths, batch_size=size, on_batch=bar.update),
                )
                finished += 1
        except KeyboardInterrupt:
            bar.close()
            left = len(missing) - finished
            print(f"Stopped: {writer.n_shards - left} of {writer.n_shards} shards are finished. Run the same again to go on.")
            raise


def kernel_of(writer: MemberWriter, *, proj_dim: int) -> torch.Tensor:
    """Return the kernel of a member whose shards are all written, summed in shard order from the stored features."""
    kernel = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for shard in range(writer.n_shards):
        accumulate_kernel(kernel, writer.read(shard).features)
    return kernel
