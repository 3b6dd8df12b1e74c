"""Hessian-vector products of the training loss, and the top of its spectrum by Arnoldi iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from hf_trak.evaluation.baselines.losses import loss_of
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.tasks import vmappable_attention


class EigenPairs(NamedTuple):
    """Eigenvalues, the largest first, and their eigenvectors of unit length."""

    values: Float64[Tensor, " n_eigenvectors"]
    vectors: Float[Tensor, "n_eigenvectors grad_dim"]


def loss_hessian(
    featurizer: Featurizer, batches: Sequence[Mapping[str, Any]]
) -> Callable[[Float[Tensor, " grad_dim"]], Float[Tensor, " grad_dim"]]:
    r"""Return the function $v \mapsto \nabla^2 \bar L\, v$, with $\bar L$ the mean loss of the rows in `batches`.

    One product costs a forward pass, a backward pass, and the backward pass of both. Vectors are flat, in the order of the
    selected parameters.
    """
    loss = loss_of(featurizer.task)
    parameters = list(featurizer.selection.parameters.values())
    sizes = [parameter.numel() for parameter in parameters]
    n_rows = sum(_n_rows(batch) for batch in batches)

    def product(vector: Tensor) -> Tensor:
        pieces = [piece.reshape(parameter.shape) for piece, parameter in zip(vector.split(sizes), parameters, strict=True)]
        total = torch.zeros_like(vector)
        # The fused kernels of attention have no second derivative.
        with evaluation_mode(featurizer.model), torch.enable_grad(), vmappable_attention(featurizer.model):
            for parameter in parameters:
                parameter.requires_grad_(True)
            for batch in batches:
                value = loss(*featurizer.task.output_function(featurizer.model, batch)).sum()
                total += _second_derivative(value, parameters, pieces)
        return total / n_rows

    return product


def _n_rows(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def _second_derivative(value: Tensor, parameters: list[nn.Parameter], vector: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    # A gradient that is constant in every parameter has no second derivative.
    curved = [(grad, piece) for grad, piece in zip(grads, vector, strict=True) if grad is not None and grad.requires_grad]
    if not curved:
        return torch.zeros(sum(p.numel() for p in parameters), dtype=value.dtype, device=value.device)
    slope = torch.stack([(grad * piece).sum() for grad, piece in curved]).sum()
    products = torch.autograd.grad(slope, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if h is None else h.flatten() for p, h in zip(parameters, products, strict=True)]
    )


def arnoldi(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, " grad_dim"], *, n_iterations: int, n_eigenvectors: int
) -> EigenPairs:
    r"""Return the largest eigenvalues of a symmetric matrix, known by its products, and their eigenvectors.

    Builds an orthonormal basis of the Krylov space of `start`, and diagonalises the matrix within it. Only positive eigenvalues
    are returned: along the others the loss has no minimum for an influence function to shift.

    Args:
        product (`Callable`): $v \mapsto Hv$.
        n_iterations (`int`): Products, and vectors held in memory; fewer where the Krylov space is exhausted.
        n_eigenvectors (`int`): How many to return at most.

    Raises:
        ValueError: If the numbers are out of range, or no eigenvalue found is positive.
    """
    if not 1 <= n_eigenvectors <= n_iterations:
        raise ValueError(
            f"`n_eigenvectors` must be from 1 to `n_iterations`, but they are {n_eigenvectors} and {n_iterations}."
        )
    basis, restricted = _krylov(product, start, n_iterations)
    values, rotations = torch.linalg.eigh((restricted + restricted.T) / 2)
    order = values.argsort(descending=True)[:n_eigenvectors]
    order = order[values[order] > values.abs().max() * torch.finfo(basis.dtype).eps * len(values)]
    if len(order) == 0:
        raise ValueError(
            f"None of the Hessian's {len(values)} eigenvalues found is positive (the largest is {values.max():.3g}): the checkpoint "
            "is not near a minimum of its training loss. Train it further, or use more `n_iterations`."
        )
    return EigenPairs(values[order], rotations[:, order].T.to(basis) @ basis)


def _krylov(product: Callable[[Tensor], Tensor], start: Tensor, n_iterations: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis, one vector a row, and the matrix restricted to it."""
    n_iterations = min(n_iterations, len(start))
    basis = start.new_zeros(n_iterations, len(start))
    basis[0] = start / start.norm()
    restricted = torch.zeros(n_iterations, n_iterations, dtype=torch.float64, device=start.device)
    largest = 0.0
    for i in range(n_iterations):
        image = product(basis[i])
        largest = max(largest, image.norm().item())
        for _ in range(2):  # once leaves what round-off adds; twice is enough
            overlap = basis[: i + 1] @ image
            restricted[: i + 1, i] += overlap.double()
            image = image - overlap @ basis[: i + 1]
        length = image.norm()
        if i + 1 == n_iterations:
            return basis, restricted
        if length <= largest * torch.finfo(start.dtype).eps * 10:  # the Krylov space is exhausted
            return basis[: i + 1], restricted[: i + 1, : i + 1]
        restricted[i + 1, i] = length
        basis[i + 1] = image / length
    raise AssertionError("unreachable")
