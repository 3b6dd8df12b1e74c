"""How the rows of a shard are cut into batches: by a number of rows, or by what a budget of tokens allows.

A shard's batches are a function of its rows, their lengths and the setting alone, never of which process computes it, of the shards
before it or of when it was begun; only then do interrupted and shared runs end in the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FIRST_ROWS = 4
_ROWS_NAMED = 256


class Budget(NamedTuple):
    """What one batch may hold at most; a row longer than `tokens` is a batch of its own."""

    rows: int
    tokens: int | None = None
    """Rows times the longest row, which is what a padded batch computes; None where rows are all alike."""


# On a CPU a token costs the same in batches of up to some 2,048 tokens, and more in larger ones, which leave the cache: MiniLM on
# QNLI took 74 to 82 CPU ms per row at 512, 1,024 and 2,048 tokens, 86 to 92 at 4,096 and 110 at 8,192; a cap of 32 rows changed
# nothing (72). The figure for CUDA is a guess at what fills a device, and has not been measured.
_BUDGETS = {"cpu": Budget(rows=32, tokens=2048), "cuda": Budget(rows=256, tokens=8192)}
_FUNCTIONAL_BUDGET = Budget(rows=32, tokens=2048)  # the gradients of all its rows exist at once


def automatic_budget(device_type: str, *, functional: bool = False) -> Budget:
    """Return what a batch of `batch_size="auto"` holds on a kind of device."""
    return _FUNCTIONAL_BUDGET if functional else _BUDGETS.get(device_type, _BUDGETS["cpu"])


class BatchSize:
    """The setting of a run: a number of rows, which is kept, or "auto", a budget that shrinks when memory runs out.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, setting: int | str = "auto", *, automatic: Budget) -> None:
        if setting != "auto" and (isinstance(setting, bool) or not isinstance(setting, int) or setting < 1):
            raise ValueError(f"`batch_size` must be 'auto' or at least 1, but is {setting!r}.")
        self.may_shrink = setting == "auto"
        self.budget = automatic if setting == "auto" else Budget(rows=int(setting))


class ShardBatches:
    """The batches of one shard, and how much of one memory has proved to hold.

    Rows of like length share a batch. The shortest go first, so that a run has its first rows soon (and its gradients checked on
    few tokens); then come the longest, so that memory runs out at once or not at all. Where a run begins, at row 0, an automatic
    batch size lets four rows go first by themselves: a whole batch would keep a CPU from its first row for up to seconds.

    Args:
        lengths (`Sequence[int]`, *optional*): A number per row of `rows` that grows with its cost: its tokens, if it has any.
    """

    def __init__(self, rows: range, lengths: Sequence[int] | None, size: BatchSize) -> None:
        self.rows = rows
        self.lengths = lengths
        self.size = size
        self.limit: int | None = None

    def length(self, row: int) -> int:
        return 1 if self.lengths is None else max(1, self.lengths[row - self.rows.start])

    def batches(self) -> list[list[int]]:
        """Cut the rows."""
        order = sorted(self.rows, key=lambda row: (-self.length(row), row))
        first = self._first(order)
        rest = self._cut([row for row in order if row not in first])
        if first:
            return [first, *rest]
        return rest if self.lengths is None else [rest[-1], *rest[:-1]]

    def _first(self, order: Sequence[int]) -> list[int]:
        """Return the rows a run begins with, which are its shard's shortest; none in other shards, and where all fit into a batch."""
        if self.rows.start != 0 or not self.size.may_shrink or len(order) <= max(self.size.budget.rows, _FIRST_ROWS):
            return []
        return list(order[:_FIRST_ROWS] if self.lengths is None else order[-_FIRST_ROWS:])

    def _cut(self, order: list[int]) -> list[list[int]]:
        most, tokens = self.size.budget
        result = []
        done = 0
        while done < len(order):
            allowed = most if tokens is None or self.lengths is None else min(most, tokens // self.length(order[done]))
            result.append(order[done : done + max(1, allowed)])
            done += len(result[-1])
        return result

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether nothing is known against computing these rows together."""
        return self.limit is None or len(rows) == 1 or self._cost(len(rows), rows) <= self.limit

    def _cost(self, n_rows: int, rows: Sequence[int]) -> int:
        return n_rows * max(map(self.length, rows))

    def shrink(self, rows: Sequence[int], error: Exception) -> None:
        """Take note that `rows` did not fit; raise `error` if it is not about memory, or nothing can be done about it.

        Raises:
            MemoryError: If the setting is a number, or a single row does not fit; the message says what to try.
        """
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise error
        if len(rows) == 1 or not self.size.may_shrink:
            way_out = "batch_size='auto' or a smaller one" if len(rows) > 1 else "fewer parameters, or shorter inputs"
            raise MemoryError(f"Out of memory with {len(rows)} rows at a time; try {way_out}.") from error
        if self.limit is None:
            logger.warning("Out of memory with %d rows at a time: going on with smaller batches.", len(rows))
        # Known for this shard alone: what the next is cut into must not depend on whether this process computed this one.
        self.limit = self._cost((len(rows) + 1) // 2, rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read_rows(dataset: Dataset, rows: list[int]) -> dict[str, list[Any]]:
    """Read rows of a dataset.

    Raises:
        ValueError: Naming the first row that cannot be read, such as one whose image is none.
    """
    try:
        return dataset[rows]
    except (OSError, ValueError, SyntaxError):  # what Pillow raises on files that are no images, truncated, or broken
        for row in rows:
            try:
                dataset[row]
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(
                    f"Row {row} of the dataset cannot be read: {error}. Repair it, or filter such rows. Nothing of this shard was "
                    "written."
                ) from error
        raise


def collate_rows(collate: Callable[[dict[str, list[Any]]], T], dataset: Dataset, rows: list[int]) -> T:
    """Read and collate some rows; an error says which rows of the dataset they are.

    Raises:
        ValueError: If a row cannot be read or cannot serve.
    """
    columns = read_rows(dataset, rows)
    try:
        return collate(columns)
    except ValueError as error:
        some = ", ".join(map(str, rows[:_ROWS_NAMED]))
        raise ValueError(
            f"{error} Rows 0 to {len(rows) - 1} of this batch are the dataset's rows {some}{', ...' if len(rows) > _ROWS_NAMED else ''}."
        ) from error
