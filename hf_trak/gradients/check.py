"""A check of the first examples: that layerwise gradients are whole, and that no example's depends on its batch mates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_trak.gradients.batch import OutputFunction, evaluation_mode, working_dtype
from hf_trak.gradients.layerwise import layerwise_features
from hf_trak.projectors import Projector

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative
_COARSE = 3e-2  # of half precision, and of weights in 8 bits, under which activations are rounded too
_NOISE = 1e-6  # differences below this are round-off of gradients that are zero


def check_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
) -> None:
    """Compare `layerwise_features` of a few examples with autograd's total gradient, and with each example alone.

    The first finds parameters that are used where no hook sees them; the second, models that mix examples.

    Raises:
        ValueError: Naming the parameters, or the rows, that disagree.
    """
    together = layerwise_features(model, batch, output_function=output_function, parameters=parameters, projector=projector)
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    tolerance = _COARSE if quantized else _TOLERANCE.get(next(iter(parameters.values())).dtype, _COARSE)

    def disagree(actual: Tensor, expected: Tensor, scale: Tensor) -> bool:
        # Not finite on both sides is another error's business.
        return bool((actual - expected).norm() > tolerance * scale.norm() + _NOISE)

    for row in range(len(together.output)):
        one = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        alone = layerwise_features(model, one, output_function=output_function, parameters=parameters, projector=projector)
        if disagree(together.features[row], alone.features[0], alone.features[0]):
            raise ValueError(
                f"The gradient of row {row} changes with the examples it shares a batch with (by "
                f"{(together.features[row] - alone.features[0]).norm() / alone.features[0].norm():.1%}), so it is not that "
                f"example's own. {type(model).__name__} mixes the examples of a batch; use gradients='functional'."
            )
    totals = _total_gradients(model, batch, output_function, parameters)
    scale = _sketch(projector, totals)
    if disagree(together.features.sum(0), scale, scale):
        missing = []
        for name, grads in totals.items():
            part = layerwise_features(
                model, batch, output_function=output_function, parameters={name: parameters[name]}, projector=projector
            )
            if disagree(part.features.sum(0), _sketch(projector, {name: grads}), scale):
                missing.append(name)
        raise ValueError(
            f"`layerwise` does not find the whole gradient of {', '.join(missing) or 'some parameters'}: the model uses them outside "
            "the modules that own them. Leave them out with `parameters`, or use gradients='functional'."
        )


def _total_gradients(
    model: nn.Module, batch: Mapping[str, Any], output_function: OutputFunction, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    with evaluation_mode(model), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        output = output_function(model, batch)[0].sum()
        if not output.requires_grad:  # it depends on no selected parameter
            return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        grads = torch.autograd.grad(output, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}


def _sketch(projector: Projector, grads: Mapping[str, Tensor]) -> Tensor:
    first = next(iter(grads.values()))
    accumulator = projector.start(1, dtype=working_dtype(first.dtype), device=first.device)
    for name, grad in grads.items():
        projector.add(accumulator, name, grad.unsqueeze(0).to(accumulator.dtype))
    return projector.finish(accumulator)[0]
