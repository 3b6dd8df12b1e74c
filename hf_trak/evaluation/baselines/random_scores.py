"""Random scores: what any method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float64

from hf_trak.evaluation.baselines.base import Checkpoints


@dataclass(frozen=True)
class RandomScores:
    """Independent standard normal scores.

    Args:
        checkpoints (`Checkpoints`, *optional*): Not looked at; taken so that all baselines are built alike.
        seed (`int`): The scores depend on it and on the two lengths alone.
    """

    checkpoints: Checkpoints | None = None
    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        return np.random.default_rng(self.seed).standard_normal((len(train), len(queries)))
