"""What goes into and comes out of a gradient engine, and the state a model must be in meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

OutputFunction = Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
"""`(model, batch) -> (output, out_to_loss)`, each `(batch,)`. Row i may depend on example i alone. `out_to_loss` is not
differentiated. `model` may be a stand-in that behaves like the model when called, or when a method is. A parameter that the function
itself reads it must get by `model.get_parameter(name)`, which may have one copy per example: (batch, *shape)."""


class BatchRefused(ValueError):
    """An engine cannot tell the gradients of a batch's examples apart; another can.

    Args:
        module (`nn.Module`, *optional*): Whose parameters it is about, where they may be tried as tensors that the examples share.
    """

    def __init__(self, message: str, module: nn.Module | None = None) -> None:
        super().__init__(message)
        self.module = module


class BatchFeatures(NamedTuple):
    """Features of one batch, rows in the batch's order."""

    output: Float[Tensor, " batch"]
    out_to_loss: Float[Tensor, " batch"]
    features: Float[Tensor, "batch proj_dim"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode with every parameter frozen and no activation in place; restore all of it afterwards."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # An activation in place would overwrite the layer output whose gradient is wanted.
    inplace = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    # `gradient_checkpointing_enable` leaves hooks that make embeddings require gradients; backward would then run to the bottom.
    forces_gradients = bool(getattr(model, "_require_grads_hooks", None))
    if forces_gradients:
        model.disable_input_require_grads()  # type: ignore[operator]
    norms = [module for module in model.modules() if _is_batch_norm(module)]
    model.eval()
    model.requires_grad_(False)
    for norm in norms:
        norm.forward = partial(_batch_norm, norm)  # type: ignore[arg-type]
    _set(inplace, "inplace", False)
    _set(checkpointing, "gradient_checkpointing", False)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        if forces_gradients:
            model.enable_input_require_grads()  # type: ignore[operator]
        _set(inplace, "inplace", True)
        _set(checkpointing, "gradient_checkpointing", True)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def _is_batch_norm(module: nn.Module) -> bool:
    is_plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and "forward" not in module.__dict__
    return is_plain and module.running_mean is not None


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, inputs: Tensor) -> Tensor:
    """Scale and shift single examples entry by entry: on CPUs, torch's own derivative is wrong where their gradient arrives permuted."""
    if len(inputs) > 1 or module.training:
        return type(module).forward(module, inputs)
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (module.running_var + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -module.running_mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    places = (1, -1, *[1] * (inputs.ndim - 2))
    return inputs * scale.to(inputs).reshape(places) + shift.to(inputs).reshape(places)


def _set(modules: list[nn.Module], attribute: str, value: bool) -> None:
    for module in modules:
        setattr(module, attribute, value)


def check_outputs(output: Tensor, out_to_loss: Tensor, batch_size: int) -> None:
    """Check what an output function returned.

    Raises:
        ValueError: If it is not one number per example.
    """
    if output.shape != (batch_size,) or out_to_loss.shape != (batch_size,):
        raise ValueError(
            f"A model output function must return two tensors of shape (batch,), but it returned shapes {tuple(output.shape)} and "
            f"{tuple(out_to_loss.shape)} for a batch of {batch_size}. Sum or average over everything but the examples."
        )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sketches are accumulated in: float64 for float64 gradients, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
