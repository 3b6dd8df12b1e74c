"""Devices and precision: where a model and its batches go, and the autocast they run under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_trak.gradients import OutputFunction

_GATHER = (
    "Save it whole to a folder (`accelerator.unwrap_model(model).save_pretrained(folder, state_dict=accelerator.get_state_dict(model))`"
    " in every process) and featurize that folder in processes of their own, as docs/guides/processes.md tells."
)


def unwrapped(model: Any) -> Any:
    """Return the model inside `torch.nn.DataParallel` and `torch.compile`, which computes the same with the same weights."""
    while (name := {"DataParallel": "module", "OptimizedModule": "_orig_mod"}.get(type(model).__name__)) is not None:
        model = getattr(model, name)
    return model


def check_whole(model: nn.Module) -> None:
    """Check that a model is in one piece here.

    Raises:
        ValueError: Naming what has spread, wrapped or emptied it, and the way out.
    """
    name = type(model).__name__
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"This {name} is partitioned by DeepSpeed ZeRO-3, whose parameters are empty between two layers. {_GATHER}"
        )
    if "DTensor" in kinds or any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules()):
        raise ValueError(f"The parameters of this {name} are sharded over processes (FSDP or tensor parallelism). {_GATHER}")
    if name == "DistributedDataParallel":
        raise ValueError(
            "This model is wrapped for training; give `accelerator.unwrap_model(model)`, which holds the same weights."
        )
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"This {name} is spread over {', '.join(devices)} by its `device_map`, and features are made where all of it lies on one "
            'device. Load it with `device_map={"": device}` or none; in `dtype=torch.bfloat16` it takes half the memory.'
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"Some weights of this {name} are not loaded (meta tensors). Load it without `device_map` or offloading."
        )


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
