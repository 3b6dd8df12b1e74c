"""Batches that remember their rows: an engine that takes one row at a time wants each without the padding that others bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

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
