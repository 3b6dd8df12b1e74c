"""Shared code of the gradient engines: selected parameters, evaluation mode and checks of a batch's outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

OutputFunction = Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
"""`(model, batch) -> (output, out_to_loss)`, each of shape `(batch,)`. Row i must depend on example i only. `out_to_loss` is not
differentiated. `model` may be a stand-in; calling it or its methods gives the same as calling the model. If the function reads a
parameter itself, it must call `model.get_parameter(name)`, which may return one copy per example: (batch, *shape)."""


class BatchRefused(ValueError):
    """An engine cannot separate the gradients of a batch's examples; another engine can.

    Args:
        module (`nn.Module`, *optional*): The module whose parameters caused the error, if they can be treated as tensors that the
            examples share (`shared.py`).
    """

    def __init__(self, message: str, module: nn.Module | None = None) -> None:
        super().__init__(message)
        self.module = module


class BatchFeatures(NamedTuple):
    """Features of one batch. Rows have the order of the batch."""

    output: Float[Tensor, " batch"]
    out_to_loss: Float[Tensor, " batch"]
    features: Float[Tensor, "batch proj_dim"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in eval mode, freeze every parameter and turn off in-place activations; restore everything afterwards."""
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
    compiled = compiled_calls(model)  # the hooks on every layer would be compiled again for each batch
    model.eval()
    forget_caches(model)
    model.requires_grad_(False)
    for norm in norms:
        norm.forward = partial(_batch_norm, norm)  # type: ignore[arg-type]
    _set(list(compiled), "_compiled_call_impl", None)
    _set(inplace, "inplace", False)
    _set(checkpointing, "gradient_checkpointing", False)
    try:
        yield
    finally:
        forget_caches(model)
        for norm in norms:
            del norm.forward
        if forces_gradients:
            model.enable_input_require_grads()  # type: ignore[operator]
        for module, call in compiled.items():
            module._compiled_call_impl = call
        _set(inplace, "inplace", True)
        _set(checkpointing, "gradient_checkpointing", True)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def compiled_calls(model: nn.Module) -> dict[Any, Any]:
    """Return the modules that were compiled in place, and what they call. torch has no public name for it."""
    return {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor has been written to in place. torch counts it for autograd, and has no public name for it."""
    return [tensor._version for tensor in tensors]


def forget_caches(model: nn.Module) -> None:
    """Clear tensors that modules cache between forward passes in eval mode, such as LeViT's and timm's attention biases.

    A cached tensor is either a constant, so its parameter would get no gradient, or part of the graph of an earlier pass. The modules
    clear it themselves in their own `train` method.
    """
    for module in model.modules():
        if not module.training and _keeps_caches(type(module)):
            module.train(True)
            module.train(False)


def _keeps_caches(kind: type[nn.Module]) -> bool:
    """Return whether a class overrides `train`. The override of transformers' models caches nothing and visits all modules, so it is
    ignored."""
    return kind.train is not nn.Module.train and kind.train.__qualname__ != "PreTrainedModel.train"


def _is_batch_norm(module: nn.Module) -> bool:
    is_plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and "forward" not in module.__dict__
    return is_plain and module.running_mean is not None


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, inputs: Tensor) -> Tensor:
    """Scale and shift single examples by plain operations: on CPUs, torch's own derivative is wrong if the incoming gradient is permuted."""
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


def _set(modules: list[nn.Module], attribute: str, value: bool | None) -> None:
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
    """Return the dtype in which sketches are accumulated: float64 for float64 gradients, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ParameterSelection:
    """Selected parameters by name, in the model's order; tied weights appear once, under their first name."""

    parameters: dict[str, nn.Parameter]
    coverage: float
    """Number of selected entries, as a share of those that are trainable or selected."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def grad_dim(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> ParameterSelection:
    """Select the trainable parameters whose name matches any of `patterns`, or all of them.

    Args:
        patterns (`Sequence[str]`, *optional*): Regular expressions, searched anywhere in a parameter's name. A pattern that matches
            no trainable parameter selects the frozen ones that it matches, such as `base_layer` for the base model under an adapter.

    Raises:
        ValueError: If the model has no trainable parameter, or if a pattern is not a regular expression, matches nothing or matches
            quantized parameters.
    """
    named = dict(model.named_parameters())
    trainable = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trainable and patterns is None:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: all have requires_grad=False. Call "
            "`requires_grad_(True)` on those whose influence you want."
        )
    if patterns is None:
        return ParameterSelection(trainable, 1.0)
    if not patterns:
        raise ValueError(
            "`parameters` is an empty list, which selects nothing; leave it out to select all trainable parameters."
        )
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in named if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"`parameters` takes regular expressions, but {pattern!r} is not one: {error}.") from error
        if not found:
            examples = ", ".join(list(named)[:3] + list(named)[-1:])
            raise ValueError(
                f"The parameter pattern {pattern!r} matches none of the {len(named)} parameters, such as {examples}."
            )
        chosen |= found & trainable.keys() or found
    selected = {name: parameter for name, parameter in named.items() if name in chosen}
    if quantized := [name for name, parameter in selected.items() if not parameter.is_floating_point()]:
        raise ValueError(
            f"{quantized[0]} is of {selected[quantized[0]].dtype}, and quantized weights have no gradients. Select the adapter's "
            "parameters, or load the model without quantization."
        )
    total = sum(parameter.numel() for parameter in (trainable | selected).values())
    return ParameterSelection(selected, sum(parameter.numel() for parameter in selected.values()) / total)
