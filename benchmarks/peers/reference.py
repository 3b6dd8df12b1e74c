"""The right answer, slowly: float64 gradients of a few examples, and what a projection of them may be off by."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from workloads import Batch, Workload

TOLERANCE = 1e-4
SIGMAS = 6.0


def first(batch: Batch, n: int) -> Batch:
    return {key: value[:n] for key, value in batch.items()}


def gradients(workload: Workload, batch: Batch, names: Sequence[str] | None = None) -> Tensor:
    """Return ∇f of each example in float64, (batch, grad_dim), of the named parameters in that order, or of all."""
    model = copy.deepcopy(workload.model).eval().double()
    parameters = dict(model.named_parameters())
    chosen = list(parameters.values()) if names is None else [parameters[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    rows = []
    for row in range(len(batch["labels"])):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        output, _ = workload.output_function(model, one)
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(output.sum(), chosen)]))
    return torch.stack(rows)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row.

    Raises:
        SystemExit: If it is more than a gradient in float32 can be off by.
    """
    error = ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error < TOLERANCE:
        raise SystemExit(f"Wrong answer: gradients differ from the float64 loop by {error:.1e}.")
    return error


def projection_error(features: Tensor, expected: Tensor) -> float:
    """Return the largest error of an inner product of features, in standard deviations of a dense normal projection.

    Args:
        features (`Tensor`): (n, proj_dim), scaled so that inner products are unbiased.
        expected (`Tensor`): The gradients that they are of, (n, grad_dim).

    Raises:
        SystemExit: If it is more than chance explains.
    """
    features, exact = features.double(), expected @ expected.T
    squares = exact.diagonal()
    deviation = ((squares.unsqueeze(1) * squares + exact.square()) / features.shape[1]).sqrt()
    error = ((features @ features.T - exact) / deviation).abs().max().item()
    if not error < SIGMAS:
        raise SystemExit(f"Wrong answer: inner products of features are {error:.1f} standard deviations off.")
    return error
