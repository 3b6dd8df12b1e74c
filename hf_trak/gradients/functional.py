"""Per-example gradients by `torch.func`: a reference for the other engines, on request (`gradients="functional"`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hf_trak.gradients.batch import BatchFeatures, OutputFunction, check_outputs, evaluation_mode, working_dtype
from hf_trak.projectors import Projector


def functional_features(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
    chunk_size: int | None = None,
) -> BatchFeatures:
    """Return the features of `batch`. `vmap` vectorises a separate forward and backward pass per row.

    The gradients of all selected parameters are in memory at once: (chunk_size, grad_dim) numbers.

    Args:
        parameters (`Mapping[str, nn.Parameter]`): From [`select_parameters`]; nothing else is differentiated.
        chunk_size (`int`, *optional*): Number of examples differentiated at the same time; by default, the whole batch.

    Raises:
        ValueError: If the model has quantized weights.
    """
    _check_not_quantized(model)
    arrays = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    constants = {key: value for key, value in batch.items() if key not in arrays}

    def output_of_one(selected: dict[str, Tensor], arrays_of_one: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        example = {**constants, **{key: value.unsqueeze(0) for key, value in arrays_of_one.items()}}
        output, out_to_loss = output_function(_StandIn(model, selected), example)
        check_outputs(output, out_to_loss, 1)
        return output[0], (output[0].detach(), out_to_loss[0])

    with evaluation_mode(model):
        selected = {name: parameter.detach() for name, parameter in parameters.items()}
        grads, (output, out_to_loss) = vmap(
            grad(output_of_one, has_aux=True), in_dims=(None, 0), chunk_size=chunk_size, randomness="error"
        )(selected, arrays)
    dtype = working_dtype(next(iter(grads.values())).dtype)
    accumulator = projector.start(len(output), dtype=dtype, device=output.device)
    with torch.no_grad():
        for name, values in grads.items():
            projector.add(accumulator, name, values.to(dtype))
        return BatchFeatures(output, out_to_loss, projector.finish(accumulator))


def _check_not_quantized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is of {parameter.dtype}, and `torch.func` does not support quantized layers. Use gradients='layerwise', "
                "the default."
            )


class _StandIn:
    """A model with other values for some parameters, for calls of the model, calls of its methods and reads of parameters."""

    def __init__(self, model: nn.Module, selected: Mapping[str, Tensor]) -> None:
        self._model = model
        self._selected = selected

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, dict(self._selected), args, kwargs, tie_weights=True)

    def get_parameter(self, name: str) -> Tensor:
        return self._selected[name] if name in self._selected else self._model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._model, name)
        if not inspect.ismethod(attribute):
            return attribute
        method = _Method(self._model, name)
        selected = {f"model.{own}": value for own, value in self._selected.items()}
        return lambda *args, **kwargs: functional_call(method, selected, args, kwargs, tie_weights=True)


class _Method(nn.Module):
    """A module whose forward pass is another method of a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.name)(*args, **kwargs)
