"""Tokens of rows: how many a model has positions for, and columns with a value per token padded to one width."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ABSURD = 10**9
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
NOT_DATA = frozenset(
    [
        "cache_params",
        "cache_position",
        "cross_attn_head_mask",
        "decoder_head_mask",
        "decoder_inputs_embeds",
        "encoder_outputs",
        "head_mask",
        "inputs_embeds",
        "logits_to_keep",
        "mems",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "return_dict",
        "use_cache",
        "use_mems",
    ]
)
"""Arguments of `forward` that are options or another form of the tokens. No column of a dataset is passed as one of them."""


def position_limit(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model has positions for; None where its configuration states no limit.

    Models of RoBERTa's family number positions from `padding_idx + 1`, so that 514 positions serve 512 tokens. BART's family skips
    `offset` rows of its table. Values of 0, -1 or beyond any memory mean no limit, as XLNet has it.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int) or not 0 < stated < _ABSURD:
        return None
    tables = [table for table in _position_tables(model) if table[0] >= stated]
    return min([stated, *(rows - skipped for rows, skipped in tables)])


def has_learned_positions(model: PreTrainedModel) -> bool:
    """Return whether a model looks its positions up in a table, so that a longer text is an error and not only untrained."""
    return bool(_position_tables(model))


def _position_tables(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return the rows of each table of positions, and how many of them no token uses."""
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _POSITION_TABLES and isinstance(weight, Tensor) and weight.ndim == 2:
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", 0)
            found.append(
                (weight.shape[0], (0 if padding is None else padding + 1) + (offset if isinstance(offset, int) else 0))
            )
    return found


def keep_tokens(name: str, value: Any, kept: np.ndarray) -> np.ndarray:
    """Return one row's value of a column without the entries of padding.

    Args:
        name (`str`): The column's, for the message.
        kept (`np.ndarray`): Which of the row's tokens are no padding.

    Raises:
        ValueError: If the value has no entry per token. The message begins with "its" and leaves the row to the caller.
    """
    try:
        found = np.asarray(value)
    except ValueError:  # lists of different lengths inside
        found = np.asarray(None)
    if found.dtype == object or found.ndim == 0 or len(found) != len(kept):
        what = f"is of shape {found.shape}" if found.dtype != object else "is missing or ragged"
        raise ValueError(
            f"its {name!r} {what}, but the model reads this column and the row has {len(kept)} tokens in 'input_ids'; there must be "
            "one entry per token. Correct the column, or remove it"
        )
    return found[kept]


def pad_tokens(values: Sequence[np.ndarray], fill: float = 0) -> Tensor:
    """Return values per token as one tensor (batch, longest, ...): filled on the right, whatever the trailing shape.

    Integers and booleans become int64, and floating values float32.

    Raises:
        ValueError: If the trailing shapes differ.
    """
    shapes = {value.shape[1:] for value in values if len(value)} or {values[0].shape[1:]}
    if len(shapes) > 1:
        raise ValueError(f"The entries per token must have one shape, but have {', '.join(map(str, sorted(shapes)))}.")
    floating = any(np.issubdtype(value.dtype, np.floating) and len(value) for value in values)
    dtype = torch.float32 if floating else torch.int64
    result = torch.full((len(values), max(1, *map(len, values)), *shapes.pop()), fill, dtype=dtype)
    for row, value in zip(result, values, strict=True):
        if len(value):
            row[: len(value)] = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
    return result


def extra_columns(names: Sequence[str], accepted: frozenset[str], known: Sequence[str]) -> list[str]:
    """Return the columns that a model's `forward` takes besides those in `known`, in order.

    Raises:
        ValueError: If a column has the name of an argument that no column can be passed as.
    """
    found = [name for name in names if name in accepted and name not in known]
    wrong = sorted(NOT_DATA.intersection(found))
    if wrong:
        raise ValueError(
            f"The column {wrong[0]!r} has the name of an argument of the model's `forward` that rows cannot give. Remove or rename it: "
            f"`dataset.remove_columns({wrong[0]!r})`."
        )
    return found


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
        found[name] = array[kept] if array.ndim and len(array) == len(kept) else array
    return found


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
        if all(array.ndim and len(array) == length for array, length in zip(arrays, lengths, strict=True)):
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
