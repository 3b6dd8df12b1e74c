"""How well a ranking finds proponents, with intervals over queries, and the choice among a method's variants.

Items are ranked by falling score; those of equal score keep their order ("stable"). Since that order is an accident, each measure
also comes as its expected value when tied items are shuffled ("expected"): a method that gives every item the same score is then
worth what chance is.

"Recall at 10" has two meanings in the literature. Here `recall_at_k` is the share of all proponents among the first k (FTRACE,
DATE-LM), and `hit_at_k` whether any is there (TrackStar, quanda). `precision_at_k` divides by k even where there are fewer items.

Akyürek et al. choose and report on the same queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float, Int64, Shaped

from hf_trak.evaluation.counterfactual import bootstrap_interval
from hf_trak.evaluation.fact_tracing.data import Candidates
from hf_trak.evaluation.fact_tracing.methods import Method
from hf_trak.hashing import stream_key

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


Half = Bool[np.ndarray, " n_query"]


class Chosen(NamedTuple):
    """A method's scores, and the variant they are of; two, where the halves chose differently."""

    variant: str
    scores: Float[np.ndarray, "n_train n_query"]


def halves(queries: Dataset, *, seed: int = 0) -> tuple[Half, Half]:
    """Return which queries are of either half: those whose ids come first by their hash, and the others.

    Raises:
        ValueError: If there are fewer than two queries.
    """
    if len(queries) < 2:
        raise ValueError(
            f"Variants are chosen on one half of the queries for the other, which takes two, but there are {len(queries)}."
        )
    order = np.argsort([stream_key("half", seed, uuid) for uuid in queries["uuid"][:]], kind="stable")
    first = np.zeros(len(queries), dtype=bool)
    first[order[: len(queries) // 2]] = True
    return first, ~first


def best_variant(measures: Mapping[str, Mapping[str, np.ndarray]], chosen_on: Half, *, metric: str = "mrr_expected") -> str:
    """Return the variant of the highest mean on some queries; the first of equals.

    Raises:
        ValueError: If there is no variant, or no query with proponents to choose on.
    """
    means = {name: of_variant[metric][chosen_on] for name, of_variant in measures.items()}
    if not means or any(np.isnan(values).all() for values in means.values()):
        raise ValueError("There is nothing to choose among, or no query with a proponent to choose on.")
    return max(means, key=lambda name: float(np.nanmean(means[name])))


def cross_fit(choose: Callable[[Half], Chosen], parts: tuple[Half, Half]) -> Chosen:
    """Return scores in which each half of the queries is ranked by what `choose` picks on the other half."""
    first, second = choose(parts[1]), choose(parts[0])
    names = dict.fromkeys([first.variant, second.variant])
    return Chosen(" / ".join(names), np.where(parts[0], first.scores, second.scores))


Level = Literal["sentence", "masking"]
LEVELS: tuple[Level, ...] = ("sentence", "masking")
CandidateScores = list[np.ndarray]
"""Per query, one score per row of its candidates, in the order of `Candidates.rows`."""


def score_candidates(method: Method, abstracts: Dataset, queries: Dataset, candidates: Sequence[Candidates]) -> CandidateScores:
    """Return the scores of every query's candidates.

    A method sees the union of all candidates, or all abstracts if it needs the whole corpus.
    """
    if getattr(method, "whole_corpus", False):
        return pick(method(abstracts, queries), candidates)
    union = np.unique(np.concatenate([of_query.rows for of_query in candidates]))
    return pick(method(abstracts.select(union), queries), candidates, union)


def pick(
    scores: Float[np.ndarray, "n_rows n_query"],
    candidates: Sequence[Candidates],
    rows: Int64[np.ndarray, " n_rows"] | None = None,
) -> CandidateScores:
    """Return each query's candidates' scores from a matrix of `rows` (by default all abstracts) and queries."""
    places = [of_query.rows if rows is None else np.searchsorted(rows, of_query.rows) for of_query in candidates]
    return [scores[place, number] for number, place in enumerate(places)]


def measure(
    scores: CandidateScores,
    candidates: Sequence[Candidates],
    sentences: Int64[np.ndarray, " n_train"],
    *,
    level: Level = "sentence",
    ks: Sequence[int] = KS,
) -> dict[str, Float[np.ndarray, " n_query"]]:
    """Return the measures of each query; those with `_expected` are expected values under random ties. NaN without proponents.

    Args:
        sentences (`np.ndarray`): A number per abstract, from [`sentence_numbers`].
        level (`"sentence"` or `"masking"`): What is ranked; a sentence's score is the highest of its maskings.
    """
    found: list[dict[str, float]] = []
    for values, of_query in zip(scores, candidates, strict=True):
        rows = of_query.rows
        if values.shape != rows.shape:
            raise ValueError(f"A query has {len(rows)} candidates, but {len(values)} scores.")
        gold = np.isin(rows, of_query.proponents)
        items = to_sentences(values, gold, sentences[rows]) if level == "sentence" else (values, gold)
        stable, expected = (rank_measures(*items, ks=ks, ties=ties) for ties in ("stable", "expected"))
        measures = stable | {f"{name}_expected": value for name, value in expected.items()}
        found.append(measures if gold.any() else dict.fromkeys(measures, float("nan")))
    return {name: np.array([measures[name] for measures in found]) for name in found[0]}


def result_rows(
    measures: Mapping[str, Float[np.ndarray, " n_query"]], *, case: str, method: str, **more: Any
) -> list[dict[str, Any]]:
    """Return one result row per measure: the mean over the queries that have proponents, and its 95 % interval."""
    rows = []
    for metric, values in measures.items():
        n_skipped = int(np.isnan(values).sum())
        values = values[~np.isnan(values)]
        interval = bootstrap_interval(values)
        rows.append(
            {
                "case": case,
                "method": method,
                "metric": metric,
                "value": float(values.mean()),
                "unit": "share",
                "interval": None if interval is None else list(interval),
                "n_queries": len(values),
                "n_skipped": n_skipped,
                **more,
            }
        )
    return rows
