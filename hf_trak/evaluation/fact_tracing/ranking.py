r"""How well a ranking finds proponents: reciprocal rank, recall, hits and precision, whatever is tied.

Items are ranked by falling score; those of equal score keep their order ("stable"). Since that order is an accident, each measure
also comes as its expected value when tied items are shuffled ("expected"): a method that gives every item the same score is then
worth what chance is.

"Recall at 10" has two meanings in the literature. Here `recall_at_k` is the share of all proponents among the first k (FTRACE,
DATE-LM), and `hit_at_k` whether any is there (TrackStar, quanda). `precision_at_k` divides by k even where there are fewer items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped

Ties = Literal["stable", "expected"]
KS = (1, 3, 5, 10, 25)


def rank_measures(
    scores: Float[np.ndarray, " n"], gold: Bool[np.ndarray, " n"], *, ks: Sequence[int] = KS, ties: Ties = "stable"
) -> dict[str, float]:
    r"""Return `mrr` (of one query: the reciprocal rank of its first proponent), and `recall_at_k`, `hit_at_k`, `precision_at_k`.

    Args:
        gold (`np.ndarray`): Which items are proponents. Without any, all measures are 0; leave such queries out of a mean.
        ks (`Sequence[int]`): Depths.
        ties (`"stable"` or `"expected"`): See above.

    Raises:
        ValueError: If a score is NaN, or shapes differ.
    """
    _check(scores, gold, ks, ties)
    n_gold = max(int(gold.sum()), 1)
    if ties == "stable":
        ranked = gold[np.argsort(-scores, kind="stable")]
        first = np.flatnonzero(ranked)
        found = {k: float(ranked[:k].sum()) for k in ks}
        hit = {k: float(found[k] > 0) for k in ks}
        reciprocal = 1.0 / (first[0] + 1) if len(first) else 0.0
    else:
        sizes, n_golds = _blocks(scores, gold)
        found = {k: _expected_found(sizes, n_golds, k) for k in ks}
        first_at = _first_gold(sizes, n_golds)
        hit = {k: float(first_at[:k].sum()) for k in ks}
        reciprocal = float((first_at / np.arange(1, len(first_at) + 1)).sum())
    measures = {"mrr": reciprocal}
    measures |= {f"recall_at_{k}": found[k] / n_gold for k in ks}
    measures |= {f"hit_at_{k}": hit[k] for k in ks}
    measures |= {f"precision_at_{k}": found[k] / k for k in ks}
    return measures


def _blocks(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of the groups of tied items, best first, and how many proponents each holds."""
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    return sizes, np.bincount(group, weights=gold, minlength=len(sizes)).astype(np.int64)


def _expected_found(sizes: np.ndarray, n_golds: np.ndarray, k: int) -> float:
    """Expected number of proponents among the first k: a group that reaches beyond k gives its share."""
    starts = np.cumsum(sizes) - sizes
    inside = np.clip(k - starts, 0, sizes)
    return float((n_golds * inside / sizes).sum())


def _first_gold(sizes: Int64[np.ndarray, " n_groups"], n_golds: Int64[np.ndarray, " n_groups"]) -> Float[np.ndarray, " n"]:
    r"""Probability that the first proponent is at each rank.

    In the first group with any, of n items with g proponents, it is the j-th item with probability
    $\binom{n-j}{g-1} / \binom{n}{g}$, here as a product of the chances to draw none before.
    """
    probability = np.zeros(int(sizes.sum()))
    if not n_golds.any():
        return probability
    group = int(np.flatnonzero(n_golds)[0])
    n, g, start = int(sizes[group]), int(n_golds[group]), int(sizes[:group].sum())
    none_before = 1.0
    for j in range(n - g + 1):
        probability[start + j] = none_before * g / (n - j)
        none_before *= (n - j - g) / (n - j)
    return probability


def to_sentences(
    scores: Float[np.ndarray, " n"], gold: Bool[np.ndarray, " n"], sentences: Shaped[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n_sentences"], Bool[np.ndarray, " n_sentences"]]:
    """Return one score per sentence, the highest of its maskings, and whether any masking is a proponent.

    Sentences keep the order of their first masking.
    """
    _, first, group = np.unique(sentences, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))  # the place of each sentence by first appearance
    best = np.full(len(first), -np.inf)
    np.maximum.at(best, order[group], scores)
    return best, np.bincount(order[group], weights=gold, minlength=len(first)) > 0


def _check(scores: np.ndarray, gold: np.ndarray, ks: Sequence[int], ties: str) -> None:
    if scores.ndim != 1 or scores.shape != gold.shape:
        raise ValueError(f"Expected a score and a flag per item, but their shapes are {scores.shape} and {gold.shape}.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN, so there is no ranking.")
    if not ks or min(ks) < 1:
        raise ValueError(f"`ks` must be depths of at least 1, but are {list(ks)}.")
    if ties not in ("stable", "expected"):
        raise ValueError(f"`ties` must be 'stable' or 'expected', but is {ties!r}.")
