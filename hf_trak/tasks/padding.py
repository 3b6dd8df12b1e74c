"""Rows of tokens: length limits, further columns of `forward`, padding to one width, and packed documents.

Packed rows come from TRL's `packing=True` (`seq_lengths`) and from flattening collators (`position_ids`, `cu_seq_lens_q`, `seq_idx`).
They reach the model with positions that begin again at 0 with every document, and without an attention mask: transformers' masks then
keep the documents apart, whatever the attention of a layer. Padding is one more document at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def tokenizer_limit(tokenizer: Any) -> int | None:
    """Return how many tokens a tokenizer says that a text may have; None if it says nothing, or a number beyond any memory.

    Raises:
        ValueError: If that is no number of tokens.
    """
    limit = getattr(tokenizer, "model_max_length", None)
    is_number = (
        isinstance(limit, (int, float))
        and not isinstance(limit, bool)
        and limit >= 1
        and (limit >= _ABSURD or limit == limit // 1)
    )
    if limit is not None and not is_number:
        raise ValueError(
            f"The tokenizer's model_max_length is {limit!r}, where a whole number of tokens, of at least 1, is expected. Correct it in its "
            "tokenizer_config.json, or set `tokenizer.model_max_length`."
        )
    return None if limit is None or limit >= _ABSURD else int(limit)


def text_limit(max_length: int | None, positions: int | None, tokenizer: Any, *, strict: bool) -> int | None:
    """Return how many tokens of a text are kept: `max_length`, or else as many as there are positions, and no more than the tokenizer
    allows; None for all.

    Args:
        strict (`bool`): Whether a text beyond the positions is an error, so that `max_length` cannot exceed them.
    """
    limits = [max_length or positions, tokenizer_limit(tokenizer), positions if strict else None]
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


PACKING_COLUMNS = ("seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")
_UNPACK = (
    "Give the documents as rows of their own: the dataset before packing, or SFTTrainer's with packing=False (`packing_strategy='wrapped'` is "
    "served as well, since it trains across documents)"
)
_TOKENS_CHECKED = 12
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative


def packed_positions(row: Mapping[str, Any], n_tokens: int) -> np.ndarray | None:
    """Return the position of each token in its document; None for a row that no column says to be packed.

    Raises:
        ValueError: If the columns contradict the tokens, or one another.
    """
    found: dict[str, np.ndarray] = {}
    if row.get("seq_lengths") is not None:
        found["seq_lengths"] = _count(np.asarray(row["seq_lengths"], dtype=np.int64), "seq_lengths", n_tokens)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if row.get(name) is not None:
            bounds = np.asarray(row[name], dtype=np.int64).reshape(-1)
            found[name] = _count(np.diff(bounds), name, n_tokens)
    if row.get("seq_idx") is not None:
        index = np.asarray(row["seq_idx"], dtype=np.int64).reshape(-1)
        starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))
        found["seq_idx"] = _count(np.diff(starts, append=len(index)), "seq_idx", n_tokens)
    if row.get("position_ids") is not None:
        positions = np.asarray(row["position_ids"], dtype=np.int64)
        if positions.shape != (n_tokens,):
            raise ValueError(
                f"it has {n_tokens} tokens in 'input_ids', and 'position_ids' of shape {positions.shape}; there must be one position per "
                "token"
            )
        jumps = np.flatnonzero(np.diff(positions) != 1) + 1
        if len(jumps):
            if positions[jumps].any():
                at = int(jumps[positions[jumps] != 0][0])
                raise ValueError(
                    f"its position_ids go from {positions[at - 1]} to {positions[at]} at token {at}, neither one further nor back to 0, where "
                    "a document begins; remove the column, or make a task with `Task.custom`"
                )
            found["position_ids"] = positions
        elif found:
            found["position_ids"] = positions
    if not found:
        return None
    (first, positions), *others = found.items()
    for name, more in others:
        if not np.array_equal(positions, more):
            raise ValueError(f"its columns {first!r} and {name!r} say that different documents are packed in it")
    return positions


def _count(lengths: np.ndarray, name: str, n_tokens: int) -> np.ndarray:
    """Return positions of documents of some lengths."""
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != n_tokens:
        raise ValueError(
            f"its documents have {lengths.sum()} tokens by {name!r}, but it has {n_tokens} in 'input_ids'; take both columns from the "
            "same packing"
        )
    return np.concatenate([np.arange(length) for length in lengths] or [np.zeros(0)]).astype(np.int64)


def is_packed(positions: np.ndarray | None) -> bool:
    """Whether there is more than one document."""
    return positions is not None and bool((positions[1:] == 0).any())


def refuse_packed(why: str) -> ValueError:
    """Return the error of a packed row that cannot be served."""
    return ValueError(f"it holds several packed documents, which {why}. {_UNPACK}")


def pad_positions(rows: list[np.ndarray], width: int) -> Tensor:
    """Return the positions of packed rows, padding being a document of its own."""
    result = torch.empty(len(rows), width, dtype=torch.int64)
    for target, positions in zip(result, rows, strict=True):
        target[: len(positions)] = torch.from_numpy(positions)
        target[len(positions) :] = torch.arange(width - len(positions))
    return result


@torch.no_grad()
def check_documents(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Run a document behind another one, and alone, if a batch is packed; both must be the same. Return whether it is.

    Raises:
        ValueError: If a document sees the one before it.
    """
    if "position_ids" not in batch or "attention_mask" in batch:
        return False
    second = batch["input_ids"][:1, :_TOKENS_CHECKED]
    first = second.flip(1).roll(1, 1)
    positions = torch.arange(second.shape[1], device=second.device).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        together = model(input_ids=torch.cat([first, second], 1), position_ids=positions.repeat(1, 2), use_cache=False).logits
        alone = model(input_ids=second, position_ids=positions, use_cache=False).logits
    finally:
        model.train(training)
    behind = together[:, second.shape[1] :]
    difference = ((behind - alone).norm() / alone.norm()).item()
    if difference > _TOLERANCE.get(alone.dtype, 3e-2):
        raise ValueError(
            f"The rows hold packed documents, and {type(model).__name__} does not keep them apart: a document's logits change by "
            f"{difference:.1%} when another one stands before it. {_UNPACK}."
        )
    return True
