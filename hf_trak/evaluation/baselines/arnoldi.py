r"""Influence functions, with the Hessian inverted on its top eigenvectors.

A task knows its output $f$ and $Q = -\partial L/\partial f$. For a classifier $L = -\log p = \log(1 + e^{-f})$ exactly, since $f$ is
the log-odds of the label; for a regression $L = \frac12 (y - f)^2$.

$\tau(z_i, z) = -\nabla f(z)^\top H^{-1} \nabla L(z_i) \approx \sum_k \frac{1}{\lambda_k} \langle v_k, \nabla f(z)\rangle\,
Q_i \langle v_k, \nabla f(z_i)\rangle$, with $\lambda_k, v_k$ the largest eigenvalues and eigenvectors of $H$, the Hessian of the mean
training loss. How many are kept is the method's regularisation.

Sources: Koh and Liang (2017), [Understanding black-box predictions via influence
functions](https://huggingface.co/papers/1703.04730); Schioppa et al. (2022), [Scaling up influence
functions](https://huggingface.co/papers/2112.03052).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from hf_trak.evaluation.baselines.base import Checkpoints, Columns, check_scores, project_gradients
from hf_trak.evaluation.baselines.gradient import GradientOf, directions
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.projectors import Projector
from hf_trak.tasks import Task, vmappable_attention
from hf_trak.tasks.outputs import classification_margin, regression_prediction


def classification_loss(output: Float[Tensor, " batch"], out_to_loss: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Return the cross-entropy of each example, $\log(1 + e^{-f})$."""
    return F.softplus(-output)


def regression_loss(output: Float[Tensor, " batch"], out_to_loss: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Return $\frac12(y - f)^2$ of each example."""
    labels = out_to_loss + output.detach()  # out_to_loss = y - f
    return (labels - output).square() / 2


LOSSES: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    classification_margin: classification_loss,
    regression_prediction: regression_loss,
}


def loss_of(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a task, as a function of its output and `out_to_loss`; its derivative in the output is -out_to_loss.

    Raises:
        ValueError: If the task's loss is not a function of its output.
    """
    if task.output_function not in LOSSES:
        raise ValueError(
            f"The loss of {task.name} is not known as a function of its output, and this baseline needs its second derivative. "
            "It serves classification and regression; gradient, TracIn, GAS and representation baselines serve any task."
        )
    return LOSSES[task.output_function]


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


@dataclass(frozen=True)
class ArnoldiInfluence:
    """Influence functions on the top eigenvectors of the Hessian, averaged over checkpoints. Gradients are exact: no sketch.

    Args:
        n_iterations (`int`): Hessian-vector products, and as many vectors of the parameters' size in memory.
        n_eigenvectors (`int`): Eigenvectors kept.
        n_hessian_rows (`int`, *optional*): Random training rows the Hessian is averaged over; None for all.
        seed (`int`): Of those rows and of the first vector.
        query_gradient (`"output"` or `"loss"`): The effect on the query's output, or on its loss as published; a classifier's
            ranking is the same.
    """

    checkpoints: Checkpoints
    n_iterations: int = 60
    n_eigenvectors: int = 20
    n_hessian_rows: int | None = 512
    seed: int = 0
    query_gradient: GradientOf = "output"

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        scores = np.zeros((len(train), len(queries)))
        for number in range(len(self.checkpoints)):
            featurizer = self.checkpoints.featurizer(number, sketched=False)
            pairs = self.eigenpairs(featurizer, train)
            projector = Subspace(_by_parameter(pairs.vectors, featurizer))
            found = [self._project(featurizer, dataset, projector) for dataset in (train, queries)]
            influence = directions(found[0], "loss") / pairs.values.cpu().numpy()
            scores += influence @ directions(found[1], self.query_gradient).T / len(self.checkpoints)
        return check_scores(scores, train, queries)

    def eigenpairs(self, featurizer: Featurizer, train: Dataset) -> EigenPairs:
        """Return the top of the Hessian's spectrum."""
        generator = np.random.default_rng(self.seed)
        n_rows = min(self.n_hessian_rows or len(train), len(train))
        rows = np.sort(generator.permutation(len(train))[:n_rows]).tolist()
        featurizer.check(train)
        batches = list(self.checkpoints.batches(featurizer, train, rows))
        first = next(iter(featurizer.selection.parameters.values()))
        start = torch.from_numpy(generator.standard_normal(featurizer.selection.grad_dim)).to(first.device, first.dtype)
        return arnoldi(
            loss_hessian(featurizer, batches), start, n_iterations=self.n_iterations, n_eigenvectors=self.n_eigenvectors
        )

    def _project(self, featurizer: Featurizer, dataset: Dataset, projector: Projector) -> Columns:
        def call(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
            found = project_gradients(featurizer, batch, projector)
            return {name: value.double().cpu().numpy() for name, value in found._asdict().items()}

        return Columns(**self.checkpoints.run(featurizer, dataset, call))


class Subspace(Projector):
    """Coordinates of gradients on a few given vectors.

    Args:
        vectors (`Mapping[str, Tensor]`): By parameter, (n_vectors, *shape).
    """

    def __init__(self, vectors: Mapping[str, Float[Tensor, "n_vectors *shape"]]) -> None:
        super().__init__(proj_dim=len(next(iter(vectors.values()))), seed=0)
        self.vectors = vectors

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        accumulator += grads.reshape(len(grads), -1) @ self.vectors[name].reshape(self.proj_dim, -1).T.to(grads.dtype)

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for number, vector in enumerate(self.vectors[name]):  # an embedding's gradient is never formed
            accumulator[:, number] += (vector[rows].to(values.dtype) * values).sum((1, 2))


def _by_parameter(vectors: Float[Tensor, "n_vectors grad_dim"], featurizer: Featurizer) -> dict[str, Tensor]:
    parameters = featurizer.selection.parameters
    pieces = vectors.split([parameter.numel() for parameter in parameters.values()], dim=1)
    return {
        name: piece.reshape(len(vectors), *parameter.shape)
        for (name, parameter), piece in zip(parameters.items(), pieces, strict=True)
    }
