"""A forward pass in bfloat16, whose gradients are float32 where they meet a sketch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_trak.gradients import OutputFunction

_FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.scaled_dot_product_attention}


def in_bfloat16(output_function: OutputFunction, *, device_type: str, vmapped: bool) -> OutputFunction:
    """Run a model output function under autocast.

    Backward follows the forward pass's dtypes and is itself outside of autocast, so that what hooks and sketches do with gradients
    is done in float32.

    Args:
        vmapped (`bool`): Whether the function is differentiated inside `vmap`.
    """

    def autocast(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        with ExitStack() as stack:
            # The cache of cast weights would keep what `torch.func` wraps for one batch.
            stack.enter_context(torch.autocast(device_type, dtype=torch.bfloat16, cache_enabled=False))
            if vmapped:
                stack.enter_context(_Float32Parts(device_type))
            return output_function(model, batch)

    return autocast


class _Float32Parts(TorchFunctionMode):
    """Keeps normalisation and attention in float32: their derivatives inside `vmap` do not take bfloat16 beside float32."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _FLOAT32:
            return func(*args, **kwargs)
        with torch.autocast(self.device_type, enabled=False):
            return func(*map(_float32, args), **{key: _float32(value) for key, value in kwargs.items()})


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
