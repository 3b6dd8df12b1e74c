"""The linear datamodeling score (LDS): how well scores predict the outputs of models trained on parts of the training set.

Source: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), section 2; Ilyas et al. (2022),
[Datamodels](https://huggingface.co/papers/2202.00622).
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64


class LDS(NamedTuple):
    """A linear datamodeling score.

    Args:
        value (`float`): Mean over the queries that have a correlation; NaN if none has.
        per_query (`np.ndarray`): Spearman correlations, NaN where there is none.
        interval (`tuple`): Bootstrap interval of the mean.
        n_undefined (`int`): Queries left out of the mean, because their predictions or outputs are the same for all subsets.
    """

    value: float
    per_query: Float[np.ndarray, " n_query"]
    interval: tuple[float, float]
    n_undefined: int


class Reliability(NamedTuple):
    """How much of a ground truth is signal.

    Args:
        split_half (`float`): Mean correlation between the means of two halves of the seeds.
        reliability (`float`): Of the mean of all seeds, by the Spearman-Brown formula.
        ceiling (`float`): The LDS that scores would reach if they ordered the noiseless outputs perfectly: √reliability.
        interval (`tuple`): Bootstrap interval, over subsets, of the ceiling.
    """

    split_half: float
    reliability: float
    ceiling: float
    interval: tuple[float, float]


def lds(
    scores: Float[np.ndarray, "n_train n_query"],
    masks: Bool[np.ndarray, "n_subsets n_train"],
    outputs: Float[np.ndarray, "*n_seeds n_subsets n_query"],
    *,
    n_bootstrap: int = 1000,
    resample: str = "subsets",
    confidence: float = 0.95,
    seed: int = 0,
) -> LDS:
    r"""Correlate, for each query, predicted with true outputs over subsets.

    The prediction of a subset is the sum of its examples' scores, $\sum_{i \in S} \tau(z_i, z)$.

    Args:
        scores (`np.ndarray`): Attribution scores; positive raises the output.
        masks (`np.ndarray`): The subsets that models were trained on.
        outputs (`np.ndarray`): Outputs of these models; the mean is taken over a leading axis of seeds.
        n_bootstrap (`int`): Resamples behind the interval; 0 for none (NaN).
        resample (`str`): What is drawn again: `"subsets"` (the paper's; the correlations are computed anew) or `"queries"`.
        seed (`int`): Of the resamples.

    Raises:
        ValueError: If shapes do not fit, or a value is not finite.
    """
    predictions, outputs = _aligned(scores, masks, outputs)
    if resample not in ("subsets", "queries"):
        raise ValueError(f"`resample` must be 'subsets' or 'queries', but is {resample!r}.")
    per_query = spearman(predictions, outputs)
    generator = np.random.default_rng(seed)
    if resample == "subsets":
        means = [
            _mean(spearman(predictions[rows], outputs[rows])) for rows in bootstrap_draws(generator, len(outputs), n_bootstrap)
        ]
    else:
        means = [_mean(per_query[rows]) for rows in bootstrap_draws(generator, len(per_query), n_bootstrap)]
    undefined = int(np.isnan(per_query).sum())
    return LDS(_mean(per_query), per_query, percentile_interval(means, confidence), undefined)


def predicted_outputs(
    scores: Float[np.ndarray, "n_train n_query"], masks: Bool[np.ndarray, "n_subsets n_train"]
) -> Float[np.ndarray, "n_subsets n_query"]:
    """Return the sum of scores over each subset, in float64."""
    return np.asarray(masks, dtype=np.float64) @ np.asarray(scores, dtype=np.float64)


def _aligned(scores: np.ndarray, masks: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if scores.ndim != 2 or masks.ndim != 2 or outputs.ndim not in (2, 3):
        raise ValueError(
            "Expected scores (n_train, n_query), masks (n_subsets, n_train) and outputs (n_subsets, n_query) or (n_seeds, n_subsets, "
            f"n_query), but their shapes are {scores.shape}, {masks.shape} and {outputs.shape}."
        )
    if masks.shape[1] != scores.shape[0]:
        hint = " The scores look transposed." if masks.shape[1] == scores.shape[1] else ""
        raise ValueError(
            f"The masks are for {masks.shape[1]} training examples, but there are scores for {scores.shape[0]}.{hint}"
        )
    if outputs.shape[-2:] != (len(masks), scores.shape[1]):
        raise ValueError(
            f"Expected outputs of {len(masks)} subsets on {scores.shape[1]} queries, as masks and scores have them, but the outputs' "
            f"shape is {outputs.shape}."
        )
    if len(masks) < 2:
        raise ValueError("A correlation needs at least two subsets, but there is only one.")
    if not np.isin(masks, (0, 1)).all():
        raise ValueError("The masks must be boolean: which training examples a subset has.")
    for name, values in (("scores", scores), ("outputs", outputs)):
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} {name} are not finite.")
    outputs = np.asarray(outputs, dtype=np.float64)
    return predicted_outputs(scores, masks), outputs.mean(0) if outputs.ndim == 3 else outputs


def spearman(
    left: Float[np.ndarray, "n_subsets n_query"], right: Float[np.ndarray, "n_subsets n_query"]
) -> Float[np.ndarray, " n_query"]:
    """Return Spearman's rank correlation of each column; NaN where a column is constant. Tied values share their mean rank."""
    left, right = _centred_ranks(left), _centred_ranks(right)
    scale = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.divide((left * right).sum(0), scale, out=np.full(len(scale), np.nan), where=scale > 0)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks of each column, less their mean, doubled: whole numbers, so that constant columns give exact zeros."""
    n_rows = len(values)
    order = values.argsort(0, kind="stable")
    ordered = np.take_along_axis(values, order, 0)
    starts = np.ones(values.shape, dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    rows = np.arange(n_rows)[:, None]
    first = np.maximum.accumulate(np.where(starts, rows, 0), axis=0)
    ends = np.ones(values.shape, dtype=bool)
    ends[:-1] = starts[1:]
    last = np.minimum.accumulate(np.where(ends, rows, n_rows)[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last - (n_rows - 1)).astype(np.float64), 0)
    return ranks


def _mean(correlations: np.ndarray) -> float:
    defined = correlations[~np.isnan(correlations)]
    return float(defined.mean()) if len(defined) else float("nan")


def bootstrap_draws(generator: np.random.Generator, count: int, n_draws: int) -> Int64[np.ndarray, "n_draws count"]:
    """Return `n_draws` draws of `count` rows, with replacement."""
    return generator.integers(count, size=(n_draws, count))


def percentile_interval(values: list[float], confidence: float) -> tuple[float, float]:
    """Return the central interval that holds a share `confidence` of `values`, those that are NaN left out."""
    defined = [value for value in values if not np.isnan(value)]
    if not defined:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def ground_truth_reliability(
    outputs: Float[np.ndarray, "n_seeds n_subsets n_query"], *, n_bootstrap: int = 200, confidence: float = 0.95, seed: int = 0
) -> Reliability:
    """Return how far the outputs of one half of the seeds order subsets as those of the other half do.

    The mean is over all ways to halve the seeds (or 20 random ones, if there are more), and over queries. With an odd number of
    seeds, one is left out of each split, and the Spearman-Brown formula extrapolates to all of them. The formula holds for Pearson's
    correlation; with ranks and normal noise, the ceiling is about .01 too high.

    Raises:
        ValueError: If there are fewer than two seeds.
    """
    if outputs.ndim != 3 or len(outputs) < 2:
        raise ValueError(
            f"Expected outputs (n_seeds, n_subsets, n_query) of at least two seeds, but the shape is {outputs.shape}."
        )
    outputs = np.asarray(outputs, dtype=np.float64)
    generator = np.random.default_rng(seed)
    halves = _halves(len(outputs), generator)

    def split_half(rows: np.ndarray) -> float:
        means = [(outputs[left][:, rows].mean(0), outputs[right][:, rows].mean(0)) for left, right in halves]
        return float(np.mean([_mean(spearman(left, right)) for left, right in means]))

    factor = len(outputs) / len(halves[0][0])
    value = split_half(np.arange(outputs.shape[1]))
    resampled = [split_half(rows) for rows in bootstrap_draws(generator, outputs.shape[1], n_bootstrap)]
    reliability = spearman_brown(value, factor)
    ceilings = [_ceiling(spearman_brown(half, factor)) for half in resampled]
    return Reliability(value, reliability, _ceiling(reliability), percentile_interval(ceilings, confidence))


def spearman_brown(correlation: float, factor: float) -> float:
    """Return the reliability of a mean over `factor` times as many measurements; 0 where the correlation is negative."""
    correlation = max(correlation, 0.0)
    return factor * correlation / (1 + (factor - 1) * correlation)


def _ceiling(reliability: float) -> float:
    return float(np.sqrt(reliability))


def _halves(n_seeds: int, generator: np.random.Generator) -> list[tuple[list[int], list[int]]]:
    """Pairs of disjoint halves of the seeds."""
    half = n_seeds // 2
    if n_seeds <= 6:
        lefts = list(combinations(range(n_seeds), half))
        pairs = [(list(left), list(right)) for left in lefts for right in lefts if left < right and not {*left} & {*right}]
        return pairs
    orders = [generator.permutation(n_seeds).tolist() for _ in range(20)]
    return [(order[:half], order[half : 2 * half]) for order in orders]
