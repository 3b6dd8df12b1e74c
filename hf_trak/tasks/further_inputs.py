"""Columns of tokenized rows that a model's `forward` takes, padded along their tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.tasks.padding import NOT_DATA


def further_inputs(
    row: Mapping[str, Any], accepted: Collection[str], kept: np.ndarray, handled: Collection[str]
) -> dict[str, np.ndarray]:
    """Return a tokenized row's other columns that `forward` takes, those along the tokens without padding.

    Args:
        accepted (`Collection[str]`): Names that the model's `forward` takes.
        kept (`np.ndarray`): Which tokens are no padding.
        handled (`Collection[str]`): Columns that are read elsewhere.

    Raises:
        ValueError: If such a column holds anything but numbers, or cannot become part of a batch.
    """
    found = {}
    for name, value in row.items():
        if name not in accepted or name in handled:
            continue
        if name in NOT_DATA:
            raise ValueError(
                f"its column {name!r} is an argument of the model's `forward` that rows cannot give; remove the column, or rename it"
            )
        array = as_numbers(name, value)
        found[name] = array[kept] if is_along(array, len(kept)) else array
    return found


def is_along(array: np.ndarray, n_tokens: int) -> bool:
    """Whether an array may have an entry per token: a number, or a vector such as a box, but no image."""
    return 1 <= array.ndim <= 2 and len(array) == n_tokens


def as_numbers(name: str, value: Any) -> np.ndarray:
    """Return a cell as an array of integers, or of floats."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind in "biu" or (array.dtype.kind == "f" and array.size == 0):
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    raise ValueError(
        f"its column {name!r} must hold numbers of a regular shape, since the model's `forward` takes it, but it holds {str(value)[:60]!r}; "
        "mend it, or remove the column"
    )


def pad_inputs(rows: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], width: int) -> dict[str, Tensor]:
    """Return columns as tensors: those along the tokens padded with zeros on the right, those of one shape stacked.

    Args:
        lengths (`Sequence[int]`): Tokens of each row.
        width (`int`): Tokens of the batch.

    Raises:
        ValueError: If some rows have a column and others do not, or it has neither an entry per token nor one shape.
    """
    batch = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if any(value is None for value in values):
            raise ValueError(f"The column {name!r} is missing in some rows of a batch. Fill it in, or remove the column.")
        arrays: list[np.ndarray] = values  # type: ignore[assignment]
        dtype = torch.float32 if any(array.dtype.kind == "f" for array in arrays) else torch.int64
        if all(is_along(array, length) for array, length in zip(arrays, lengths, strict=True)):
            inner = {array.shape[1:] for array in arrays if len(array)} or {arrays[0].shape[1:]}
            if len(inner) == 1:
                result = torch.zeros(len(arrays), width, *inner.pop(), dtype=dtype)
                for target, array in zip(result, arrays, strict=True):
                    if len(array):
                        target[: len(array)] = torch.from_numpy(array)
                batch[name] = result
                continue
        if len(shapes := {array.shape for array in arrays}) > 1:
            first, second = sorted(shapes)[:2]
            raise ValueError(
                f"The column {name!r}, which the model's `forward` takes, cannot become part of a batch: it has neither one entry per "
                f"token nor the same shape in every row, but {first} in one and {second} in another. Pad it to one shape in the "
                "dataset, or remove the column."
            )
        batch[name] = torch.from_numpy(np.stack(arrays)).to(dtype)
    return batch
