"""Measures of fact tracing as a metric of the `evaluate` library.

This file stands alone, so that it can be the whole of a Space; `hf_trak.evaluation.fact_tracing.ranking` computes the same numbers.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = """\
@inproceedings{akyurek2022tracing,
  title = {Towards Tracing Knowledge in Language Models Back to the Training Data},
  author = {Ekin Aky{\\"u}rek and Tolga Bolukbasi and Frederick Liu and Binbin Xiong and Ian Tenney and Jacob Andreas and Kelvin Guu},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2022},
  year = {2022},
}
"""

_DESCRIPTION = """\
How well a ranking of training examples finds those that state the fact that a model was asked for: mean reciprocal rank, and recall, hits
and precision among the first k. Items of equal score keep their order; since that order is an accident, every measure also comes as its
expected value when tied items are shuffled.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`): Per query, the score of each candidate.
    references (`list[list[int]]`): Per query, 1 for each candidate that is a proponent, else 0.
    sentences (`list[list[int]]`, *optional*): Per query, a number per candidate, the same for maskings of one sentence. Then sentences
        are ranked: the score of each is the highest of its maskings.
    ks (`list[int]`, defaults to `[1, 3, 5, 10, 25]`): Depths.

Returns:
    `dict`: `mrr`, `recall_at_k` (share of the proponents among the first k), `hit_at_k` (whether any is there) and `precision_at_k`
    (divided by k even if there are fewer candidates), each the mean over the queries with proponents; the same with `_expected`, under
    random ties; `n_queries`, and `n_skipped`, how many queries have no proponent.

Examples:
    >>> metric = evaluate.load("fact_tracing")
    >>> result = metric.compute(predictions=[[0.9, 0.7, 0.7, 0.1]], references=[[0, 1, 0, 1]], ks=[2])
    >>> result["mrr"], result["recall_at_2"], result["recall_at_2_expected"]
    (0.5, 0.5, 0.25)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FactTracing(evaluate.Metric):
    """Mean reciprocal rank, recall, hits and precision of ranked training examples."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
            reference_urls=["https://huggingface.co/papers/2205.11482"],
        )

    def _compute(self, predictions: Any, references: Any, sentences: Any = None, ks: Any = (1, 3, 5, 10, 25)) -> dict[str, Any]:
        if not len(ks) or min(ks) < 1:
            raise ValueError(f"`ks` must be depths of at least 1, but are {list(ks)}.")
        if sentences is not None and len(sentences) != len(predictions):
            raise ValueError(f"There are {len(predictions)} queries, but `sentences` has {len(sentences)}.")
        found = []
        for number, (scores, gold) in enumerate(zip(predictions, references, strict=True)):
            scores, gold = np.asarray(scores, dtype=np.float64), np.asarray(gold, dtype=bool)
            _check(scores, gold, number)
            if sentences is not None:
                scores, gold = _to_sentences(scores, gold, np.asarray(sentences[number]))
            if gold.any():
                found.append(_measures(scores, gold, ks))
        means = {name: float(np.mean([one[name] for one in found])) for name in (found[0] if found else {})}
        return {**means, "n_queries": len(found), "n_skipped": len(predictions) - len(found)}


def _check(scores: np.ndarray, gold: np.ndarray, number: int) -> None:
    if scores.shape != gold.shape:
        raise ValueError(f"Query {number} has {len(scores)} scores, but {len(gold)} references.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores of query {number} are NaN.")


def _to_sentences(scores: np.ndarray, gold: np.ndarray, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places: dict[Any, int] = {}
    group = np.array([places.setdefault(sentence, len(places)) for sentence in sentences.tolist()])
    best = np.full(len(places), -np.inf)
    np.maximum.at(best, group, scores)
    return best, np.bincount(group, weights=gold, minlength=len(places)) > 0


def _measures(scores: np.ndarray, gold: np.ndarray, ks: Any) -> dict[str, float]:
    ranked = gold[np.argsort(-scores, kind="stable")]
    n_gold = int(gold.sum())
    _, group, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    golds = np.bincount(group, weights=gold, minlength=len(sizes))
    starts = np.cumsum(sizes) - sizes
    first = _first_gold(sizes, golds, len(scores))
    measures = {"mrr": 1.0 / (int(np.argmax(ranked)) + 1), "mrr_expected": float((first / np.arange(1, len(first) + 1)).sum())}
    for k in ks:
        stable = float(ranked[:k].sum())
        expected = float((golds * np.clip(k - starts, 0, sizes) / sizes).sum())
        for suffix, n_found, hit in (("", stable, float(stable > 0)), ("_expected", expected, float(first[:k].sum()))):
            measures[f"recall_at_{k}{suffix}"] = n_found / n_gold
            measures[f"hit_at_{k}{suffix}"] = hit
            measures[f"precision_at_{k}{suffix}"] = n_found / k
    return measures


def _first_gold(sizes: np.ndarray, golds: np.ndarray, n: int) -> np.ndarray:
    """Probability that the first proponent is at each rank, when ties are shuffled."""
    group = int(np.flatnonzero(golds)[0])
    size, n_gold, start = int(sizes[group]), int(golds[group]), int(sizes[:group].sum())
    probability, none_before = np.zeros(n), 1.0
    for j in range(size - n_gold + 1):
        probability[start + j] = none_before * n_gold / (size - j)
        none_before *= (size - j - n_gold) / (size - j)
    return probability
