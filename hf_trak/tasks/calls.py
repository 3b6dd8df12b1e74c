"""How output functions call a model: with what its `forward` takes, and not on rows that cannot share a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

APART = "apart"
"""Key of a batch whose rows cannot be computed together; its value says why. Such rows go one at a time."""

NOT_INPUTS = ("labels", "start_positions", "end_positions", APART)


def call_model(model: Callable[..., Any], batch: Mapping[str, Any], **options: Any) -> Any:
    """Return a model's result for a batch, without labels and without a cache of keys and values.

    Raises:
        ValueError: If the rows of the batch cannot share one.
    """
    if APART in batch:
        raise ValueError(f"These rows cannot share a batch: {batch[APART]}. Use gradients='loop' or 'auto' (--gradients loop)")
    if takes(model, "use_cache"):
        options.setdefault("use_cache", False)
    return model(**{key: value for key, value in batch.items() if key not in NOT_INPUTS}, **options)


def takes(model: Any, name: str) -> bool:
    """Whether the `forward` of a model names an argument; False for a callable that is no model."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    forward = getattr(type(model), "forward", None) or getattr(getattr(model, "_model", None), "forward", None)
    return forward is not None and name in inspect.signature(forward).parameters


def logits_of(result: Any) -> Tensor:
    """Return a classifier's logits, in at least float32.

    PP-LCNet returns them as `last_hidden_state`, which is then of shape (batch, classes).

    Raises:
        ValueError: If the result has none.
    """
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = getattr(result, "last_hidden_state", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = ", ".join(result) if isinstance(result, Mapping) else type(result).__name__
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"Expected logits of shape (batch, classes), but the model returns {found}{shape}. Make a task with `Task.custom`."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
