"""From scores to a table: candidates ranked per query, at the level of sentences or of maskings, with intervals over queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int64

from hf_trak.evaluation.counterfactual import bootstrap_interval
from hf_trak.evaluation.fact_tracing.candidates import Candidates
from hf_trak.evaluation.fact_tracing.methods import Method
from hf_trak.evaluation.fact_tracing.ranking import KS, rank_measures, to_sentences

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
