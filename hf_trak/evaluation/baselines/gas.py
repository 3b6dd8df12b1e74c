r"""GAS, gradient aggregated similarity: TracIn with each gradient scaled to length 1.

$\tau(z_i, z) = \sum_t \eta_t \cos\big(\nabla L(z_i; \theta_t), \nabla L(z; \theta_t)\big)$. Without the lengths, examples with a
large loss no longer come first for every query.

Source: Hammoudeh and Lowd (2022), [Identifying a training-set attack's target using renormalized influence
estimation](https://huggingface.co/papers/2201.10055).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float64

from hf_trak.evaluation.baselines.base import Checkpoints
from hf_trak.evaluation.baselines.gradient import GradientOf, weighted_similarity
from hf_trak.evaluation.baselines.tracin import check_learning_rates


@dataclass(frozen=True)
class GAS:
    """Cosines of loss gradients, summed over checkpoints with their learning rates.

    Args:
        checkpoints (`Checkpoints`): Of one run, in any order.
        learning_rates (`Sequence[float]`, *optional*): The learning rate at each checkpoint; by default all are 1.
        query_gradient (`"loss"` or `"output"`): The same thing for a classifier; for a regression, `"output"` measures the effect
            on the prediction in place of its loss.
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
            kind="cosine",
            train_gradient="loss",
            query_gradient=self.query_gradient,
        )
