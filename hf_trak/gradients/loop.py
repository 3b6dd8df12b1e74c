"""Per-example gradients one example at a time, by plain autograd: right for any model, at the price of batches of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_trak.gradients.batch import BatchFeatures, OutputFunction, check_outputs, evaluation_mode, forget_caches, working_dtype
from hf_trak.projectors import Projector

_FEW = 4  # a table's gradient is sketched by its rows where fewer than one in so many have any


def loop_features(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
) -> BatchFeatures:
    """Return the features of examples, each from its own forward and backward pass, sketched parameter by parameter.

    One example's gradients of all selected parameters exist at once.

    Args:
        batch (`Mapping` or a sequence): A batch, which is cut into its rows, padding and all; or batches of one row each, which
            are then what the model sees.
        parameters (`Mapping[str, nn.Parameter]`): From [`select_parameters`]; nothing else is differentiated.
    """
    rows = rows_of(batch) if isinstance(batch, Mapping) else batch
    outputs, out_to_losses, features = [], [], []
    with evaluation_mode(model), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for row in rows:
            forget_caches(model)
            try:
                output, out_to_loss = output_function(model, row)
            except (AssertionError, NotImplementedError) as error:
                raise ValueError(
                    f"{type(model).__name__} itself refuses a forward pass with gradients in evaluation mode, where features are computed: "
                    f"{error}"
                ) from error
            check_outputs(output, out_to_loss, 1)
            accumulator = projector.start(1, dtype=working_dtype(output.dtype), device=output.device)
            if output.requires_grad:
                grads = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
                with torch.no_grad():
                    for name, grad in zip(parameters, grads, strict=True):
                        if grad is not None:
                            _add(projector, accumulator, name, grad)
                    del grads, grad  # before the next row's are made
            outputs.append(output.detach())
            out_to_losses.append(out_to_loss.detach())
            features.append(projector.finish(accumulator))
    return BatchFeatures(torch.cat(outputs), torch.cat(out_to_losses), torch.cat(features))


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a batch's rows as batches of one; what is no tensor belongs to each of them."""
    n_rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    return [
        {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for row in range(n_rows)
    ]


def _add(projector: Projector, accumulator: Tensor, name: str, grad: Tensor) -> None:
    grad = grad.to(accumulator.dtype)
    if grad.ndim == 2 and grad.shape[0] > _FEW:
        # Of an embedding table, few rows have a gradient. `any` would take four times as long.
        rows = torch.linalg.vector_norm(grad, ord=1, dim=1).nonzero().flatten()
        if len(rows) * _FEW < grad.shape[0]:
            projector.add_rows(accumulator, name, (grad.shape[0], grad.shape[1]), rows.unsqueeze(0), grad[rows].unsqueeze(0))
            return
    projector.add(accumulator, name, grad.unsqueeze(0))
