"""Packed rows: several documents in one row, each of which attends to itself alone.

Packed rows come from TRL's `packing=True` (`seq_lengths`) and from flattening collators (`position_ids`, `cu_seq_lens_q`, `seq_idx`).
They reach the model with positions that begin again at 0 with every document, and without an attention mask: transformers' masks then
keep the documents apart, whatever the attention of a layer. Padding is one more document at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
        elif found and positions[0] == 0:
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
def check_documents(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run a document behind another one, and alone, if a batch is packed; both must be the same.

    Raises:
        ValueError: If a document sees the one before it.
    """
    if "position_ids" not in batch or "attention_mask" in batch:
        return
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
