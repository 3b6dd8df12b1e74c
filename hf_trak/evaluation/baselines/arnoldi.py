r"""Influence functions, with the Hessian inverted on its top eigenvectors.

$\tau(z_i, z) = -\nabla f(z)^\top H^{-1} \nabla L(z_i) \approx \sum_k \frac{1}{\lambda_k} \langle v_k, \nabla f(z)\rangle\,
Q_i \langle v_k, \nabla f(z_i)\rangle$, with $\lambda_k, v_k$ the largest eigenvalues and eigenvectors of $H$, the Hessian of the mean
training loss. How many are kept is the method's regularisation.

Sources: Koh and Liang (2017), [Understanding black-box predictions via influence
functions](https://huggingface.co/papers/1703.04730); Schioppa et al. (2022), [Scaling up influence
functions](https://huggingface.co/papers/2112.03052).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hf_trak.evaluation.baselines.base import Checkpoints, Columns, check_scores, project_gradients
from hf_trak.evaluation.baselines.gradient import GradientOf, directions
from hf_trak.evaluation.baselines.hessian import EigenPairs, arnoldi, loss_hessian
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.projectors import Projector


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
