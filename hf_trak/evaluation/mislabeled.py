"""Mislabeled examples: how many of them a ranking puts on top."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def found_share(scores: Float[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"], fraction: float) -> float:
    """Return the share of the flipped examples that are among the top `fraction` of all examples.

    Chance finds `fraction` of them. Where scores tie, the earlier example comes first.

    Args:
        scores (`np.ndarray`): The more suspicious an example, the higher.
        flipped (`np.ndarray`): Which examples are mislabeled.
        fraction (`float`): Share of the examples one is willing to look at, above 0 and at most 1; at least one is looked at.

    Raises:
        ValueError: If nothing is flipped, a score is NaN, `fraction` is out of range, or the lengths differ.
    """
    _check(scores, flipped)
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be above 0 and at most 1, but is {fraction}.")
    n_top = max(1, round(fraction * len(scores)))
    top = np.argsort(-scores, kind="stable")[:n_top]
    return float(flipped[top].sum() / flipped.sum())


def mislabel_auc(scores: Float[np.ndarray, " n"], flipped: Bool[np.ndarray, " n"]) -> float:
    """Return the probability that a flipped example scores above one that is not, ties counting half; chance is 0.5.

    Raises:
        ValueError: If all or none are flipped, a score is NaN, or the lengths differ.
    """
    _check(scores, flipped)
    n_flipped = int(flipped.sum())
    n_others = len(flipped) - n_flipped
    if n_others == 0:
        raise ValueError(f"All {n_flipped} examples are flipped: there is nothing to tell them from.")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[value]  # mean rank of tied scores, from 1
    return float((ranks[flipped].sum() - n_flipped * (n_flipped + 1) / 2) / (n_flipped * n_others))


def _check(scores: np.ndarray, flipped: np.ndarray) -> None:
    if scores.shape != flipped.shape or scores.ndim != 1:
        raise ValueError(
            f"`scores` and `flipped` must be vectors of one length, but have shapes {scores.shape} and {flipped.shape}."
        )
    if not flipped.any():
        raise ValueError("No example is flipped, so there is nothing to find.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN.")
