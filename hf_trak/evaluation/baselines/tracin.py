r"""TracIn-CP: how much the query's loss fell in the steps on a training example, at a few checkpoints of one run.

$\tau(z_i, z) = \sum_t \eta_t \langle \nabla L(z_i; \theta_t), \nabla L(z; \theta_t)\rangle$, with $\eta_t$ the learning rate at
checkpoint t.

Source: Pruthi et al. (2020), [Estimating training data influence by tracing gradient
descent](https://huggingface.co/papers/2002.08484).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float64

from hf_trak.evaluation.baselines.base import Checkpoints
from hf_trak.evaluation.baselines.gradient import GradientOf, weighted_similarity


@dataclass(frozen=True)
class TracInCP:
    """Dot products of loss gradients, summed over checkpoints with their learning rates.

    Args:
        checkpoints (`Checkpoints`): Of one run, in any order.
        learning_rates (`Sequence[float]`, *optional*): The learning rate at each checkpoint; by default all are 1.
        query_gradient (`"loss"` or `"output"`): `"output"` measures the effect on the query's output in place of its loss.
    """

    checkpoints: Checkpoints
    learning_rates: Sequence[float] | None = None
    query_gradient: GradientOf = "loss"

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        return weighted_similarity(
            self.checkpoints,
            train,
            queries,
            weights=check_learning_rates(self.learning_rates, len(self.checkpoints)),
            kind="dot",
            train_gradient="loss",
            query_gradient=self.query_gradient,
        )


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
