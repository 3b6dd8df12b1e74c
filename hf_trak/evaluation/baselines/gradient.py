r"""Baselines of gradients: similarity, GAS, and TracIn.

$\tau(z_i, z) = \frac1M \sum_m \langle d(z_i; \theta_m), d(z; \theta_m)\rangle$, or the mean cosine. $d$ is the direction in which a
step on the example moves the weights: $-\nabla L$ for its loss, or $\nabla f$ for its model output. The loss's gradient costs nothing
beside the output's, since $\nabla L = \frac{\partial L}{\partial f}\nabla f = -Q\,\nabla f$, with $Q$ = `out_to_loss`, $1 - p$ for a
classifier.

Sources: Charpiat et al. (2019), [Input similarity from the neural network
perspective](https://huggingface.co/papers/2102.05262); Hanawa et al. (2021), [Evaluation of similarity-based
explanations](https://huggingface.co/papers/2006.04528).

$\tau(z_i, z) = \sum_t \eta_t \cos\big(\nabla L(z_i; \theta_t), \nabla L(z; \theta_t)\big)$. Without the lengths, examples with a
large loss no longer come first for every query.

Source: Hammoudeh and Lowd (2022), [Identifying a training-set attack's target using renormalized influence
estimation](https://huggingface.co/papers/2201.10055).

$\tau(z_i, z) = \sum_t \eta_t \langle \nabla L(z_i; \theta_t), \nabla L(z; \theta_t)\rangle$, with $\eta_t$ the learning rate at
checkpoint t.

Source: Pruthi et al. (2020), [Estimating training data influence by tracing gradient
descent](https://huggingface.co/papers/2002.08484).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float64

from hf_trak.evaluation.baselines.base import Checkpoints, Columns, GradientOf, check_scores, similarity


def directions(columns: Columns, of: GradientOf) -> Float64[np.ndarray, "n proj_dim"]:
    r"""Return where a step on each example moves the weights: $-\nabla L = Q\,\nabla f$ for `"loss"`, $\nabla f$ for `"output"`.

    Raises:
        ValueError: If `of` is neither.
    """
    if of not in ("loss", "output"):
        raise ValueError(f"A gradient is of the 'loss' or of the 'output', not of {of!r}.")
    features = columns.features.astype(np.float64)
    return features if of == "output" else columns.out_to_loss.astype(np.float64)[:, None] * features


@dataclass(frozen=True)
class GradientSimilarity:
    """Dot product or cosine of gradients, averaged over checkpoints.

    The query's gradient is of its loss, as published: a positive score lowers the query's loss. Wherever `out_to_loss` is positive,
    as for every classifier, that is to raise its output, and for one checkpoint the ranking of the training examples is the same;
    for a regression use `query_gradient="output"`.

    Args:
        similarity (`"dot"` or `"cosine"`): Cosines do not depend on `out_to_loss` but for its sign.
        train_gradient, query_gradient (`"loss"` or `"output"`): What is differentiated on either side.
    """

    checkpoints: Checkpoints
    similarity: Literal["dot", "cosine"] = "dot"
    train_gradient: GradientOf = "loss"
    query_gradient: GradientOf = "loss"

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        weights = [1 / len(self.checkpoints)] * len(self.checkpoints)
        return weighted_similarity(
            self.checkpoints,
            train,
            queries,
            weights=weights,
            kind=self.similarity,
            train_gradient=self.train_gradient,
            query_gradient=self.query_gradient,
        )


def weighted_similarity(
    checkpoints: Checkpoints,
    train: Dataset,
    queries: Dataset,
    *,
    weights: Sequence[float],
    kind: str,
    train_gradient: GradientOf,
    query_gradient: GradientOf,
) -> Float64[np.ndarray, "n_train n_query"]:
    """Return the weighted sum over checkpoints of the similarities of gradients."""
    scores = np.zeros((len(train), len(queries)))
    for number, weight in enumerate(weights):
        train_directions = directions(checkpoints.columns(number, train, train=train, of=train_gradient), train_gradient)
        query_directions = directions(checkpoints.columns(number, queries, train=train, of=query_gradient), query_gradient)
        scores += weight * similarity(train_directions, query_directions, kind)
    return check_scores(scores, train, queries)


@dataclass(frozen=True)
class TracInCP:
    """Dot products of loss gradients, summed over checkpoints with their learning rates.

    Args:
        checkpoints (`Checkpoints`): Of one run, in any order.
        learning_rates (`Sequence[float]`, *optional*): The learning rate at each checkpoint; by default all are 1.
        query_gradient (`"loss"` or `"output"`): `"output"` measures the effect on the query's output in place of its loss. For a classifier,
            the two rank alike.
    """

    checkpoints: Checkpoints
    learning_rates: Sequence[float] | None = None
    query_gradient: GradientOf = "loss"
    _kind: ClassVar[str] = "dot"

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        return weighted_similarity(
            self.checkpoints,
            train,
            queries,
            weights=check_learning_rates(self.learning_rates, len(self.checkpoints)),
            kind=self._kind,
            train_gradient="loss",
            query_gradient=self.query_gradient,
        )


@dataclass(frozen=True)
class GAS(TracInCP):
    """[`TracInCP`] with cosines in place of dot products."""

    _kind: ClassVar[str] = "cosine"


def check_learning_rates(learning_rates: Sequence[float] | None, n_checkpoints: int) -> list[float]:
    """Return one weight per checkpoint.

    Raises:
        ValueError: If there are more or fewer learning rates than checkpoints, one is not a number of at least 0, or all are 0.
    """
    if learning_rates is None:
        return [1.0] * n_checkpoints
    weights = [float(rate) for rate in learning_rates]
    if len(weights) != n_checkpoints:
        raise ValueError(f"There are {n_checkpoints} checkpoints, but {len(weights)} learning rates. Give one for each.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"Learning rates must be numbers of at least 0, and not all 0, but are {weights}.")
    return weights
