"""Tokens of rows: how many a model has positions for, and columns with a value per token padded to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ABSURD = 10**9
_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
NOT_DATA = frozenset(
    {"cache_params", "cache_position", "inputs_embeds", "logits_to_keep", "num_items_in_batch", "output_attentions"}
    | {"output_hidden_states", "past_key_values", "return_dict", "use_cache"}
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


def text_limit(max_length: int | None, positions: int | None, tokenizer: Any, *, strict: bool) -> int | None:
    """Return how many tokens of a text are kept: `max_length`, or else as many as there are positions, and no more than the tokenizer
    allows; None for all.

    Args:
        strict (`bool`): Whether a text beyond the positions is an error, so that `max_length` cannot exceed them.
    """
    limits = [max_length or positions, getattr(tokenizer, "model_max_length", None), positions if strict else None]
    limit = min((value for value in limits if value), default=_ABSURD)
    return int(limit) if limit < _ABSURD else None


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


def refuse_texts_without_boxes(accepted: frozenset[str]) -> None:
    """Refuse texts for a model of documents, which would take every word to lie in one corner of the page.

    Raises:
        ValueError: If the model's `forward` takes boxes.
    """
    if "bbox" in accepted:
        raise ValueError(
            "The model reads a box for each token ('bbox'), and rows of texts would be read without any. Prepare the rows with the model's "
            "processor ('input_ids', 'bbox' and what else it makes)."
        )


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


def vocabulary_size(model: Any) -> int | None:
    """Return how many token ids a model has an embedding for; None where ids are not rows of one matrix."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None
