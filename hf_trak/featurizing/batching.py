"""Batches: rows grouped by length, fetched ahead of their use, and collated.

A shard's batches are a function of its rows, their lengths and the setting alone, never of which process computes it, of the shards
before it or of when it was begun; only then do interrupted and shared runs end in the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hf_trak.gradients import BatchFeatures

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
    except Exception as error:
        if not _is_of_a_file(error):
            raise
        for row in rows:
            _read_row(dataset, row)
        raise


def _read_row(dataset: Dataset, row: int) -> None:
    try:
        dataset[row]
    except Exception as error:
        if not _is_of_a_file(error):
            raise
        reason = str(error).partition(" <_io.")[0].rstrip(".")
        raise ValueError(f"Row {row} of the dataset cannot be read: {reason}. Repair it, or filter such rows.") from error


def _is_of_a_file(error: Exception) -> bool:
    """Return whether an error is what Pillow raises on files that are no images, truncated, broken or far too large."""
    return isinstance(error, (OSError, ValueError, SyntaxError)) or type(error).__module__.partition(".")[0] == "PIL"


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


def fetch(features: BatchFeatures) -> BatchFeatures:
    """Fetch all that a batch gave in one copy: each copy waits for the device."""
    numbers = torch.stack([features.output, features.out_to_loss], dim=1).to(features.features.dtype)
    packed = torch.cat([features.features, numbers], dim=1).cpu()
    return BatchFeatures(packed[:, -2], packed[:, -1], packed[:, :-2])


def not_finite(features: BatchFeatures) -> list[int]:
    """Return the rows of what was fetched that are not finite."""
    finite = features.features.isfinite().all(1) & features.output.isfinite() & features.out_to_loss.isfinite()
    return (~finite).nonzero().flatten().tolist()


def check_finite(features: BatchFeatures, ids: Sequence[int] | None = None) -> None:
    """Check what was fetched.

    Args:
        ids (`Sequence[int]`, *optional*): The rows' ids, for the message.

    Raises:
        ValueError: If a row's output or gradient is not finite; the message names the rows.
    """
    if bad := not_finite(features):
        names = [ids[row] for row in bad] if ids is not None else bad
        raise ValueError(
            f"The gradients of {len(bad)} examples are not finite: rows {', '.join(map(str, names[:10]))}"
            f"{', ...' if len(bad) > 10 else ''}. Look for NaN in their inputs or in the model's weights, or overflow in half "
            "precision. Nothing of this shard was written."
        )


Columns = Mapping[str, Sequence[Any]]
_MASKS = ("attention_mask", "decoder_attention_mask", "pixel_attention_mask")


class Collated(dict[str, Any]):
    """A batch, and the rows it was made of.

    Args:
        rows (`Mapping`): Columns, as a dataset gives them.
        collate (`Callable`): What made the batch of them.
    """

    def __init__(self, batch: Mapping[str, Any], rows: Columns, collate: Callable[[Columns], Mapping[str, Any]]) -> None:
        super().__init__(batch)
        self.rows = rows
        self._collate = collate

    def of(self, numbers: Sequence[int]) -> Mapping[str, Any]:
        """Return a batch of some of the rows, in this order."""
        return self._collate({name: [values[number] for number in numbers] for name, values in self.rows.items()})

    def to(self, device: torch.device) -> Collated:
        """Return this batch with its tensors on a device."""
        return Collated(to_device(self, device), self.rows, self._collate)


def part_of(batch: Mapping[str, Any], numbers: Sequence[int]) -> Mapping[str, Any]:
    """Return a batch of some rows of another, without padding where the batch knows its rows.

    Raises:
        ValueError: If it does not, and has padding.
    """
    if isinstance(batch, Collated):
        return batch.of(numbers)
    part = {key: value[list(numbers)] if isinstance(value, Tensor) else value for key, value in batch.items()}
    if len(numbers) == 1 and has_padding(part):
        part = _without_padding(part)
    if len(numbers) == 1 and has_padding(part):
        raise ValueError(
            "This batch has padding, and its rows are needed one by one without it. Make batches by `Featurizer.collate`, which "
            "keeps the rows beside them, or pass rows to the Featurizer itself."
        )
    return part


def _without_padding(row: dict[str, Any]) -> dict[str, Any]:
    """Cut the padding off a batch of one row of tokens, where it lies on the right and nothing but tokens is as wide."""
    mask = row.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return row
    width, length = mask.shape[1], int(mask.ne(0).sum())
    as_wide = [name for name, value in row.items() if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width]
    if not mask[:, :length].ne(0).all() or any(row[name].ndim > 2 or row[name].is_floating_point() for name in as_wide):
        return row
    return {name: value[:, :length] if name in as_wide else value for name, value in row.items()}


def has_padding(batch: Mapping[str, Any]) -> bool:
    """Return whether a mask of a batch hides anything."""
    masks = [batch[name] for name in _MASKS if isinstance(batch.get(name), Tensor)]
    return any(bool((mask == 0).any()) for mask in masks)


def count_rows(batch: Mapping[str, Any]) -> int:
    """Return how many rows a batch has."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()}
