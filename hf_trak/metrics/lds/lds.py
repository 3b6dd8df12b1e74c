"""The linear datamodeling score as a metric of the `evaluate` library.

This file stands alone, so that it can be the whole of a Space; `hf_trak.evaluation.lds` computes the same numbers from scores and
masks.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import rankdata

_CITATION = """\
@inproceedings{park2023trak,
  title = {TRAK: Attributing Model Behavior at Scale},
  author = {Sung Min Park and Kristian Georgiev and Andrew Ilyas and Guillaume Leclerc and Aleksander Madry},
  booktitle = {International Conference on Machine Learning (ICML)},
  year = {2023},
}
"""

_DESCRIPTION = """\
The linear datamodeling score (LDS) measures how well data attribution predicts counterfactuals. Models are trained on random subsets of
a training set. For each query, the sum of the attribution scores of a subset's examples is the prediction of the model's output; the
LDS is Spearman's rank correlation of predictions and outputs over subsets, averaged over queries.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`): One row per subset: the predicted output for each query, that is `masks @ scores`.
    references (`list[list[float]]`): One row per subset: the output for each query of a model trained on the subset (the mean, if
        there are several).
    n_bootstrap (`int`, defaults to 1000): Resamples behind the interval; 0 for none.
    resample (`str`, defaults to `"subsets"`): What is drawn again: `"subsets"` or `"queries"`.
    confidence (`float`, defaults to 0.95): Of the interval.
    seed (`int`, defaults to 0): Of the resamples.

Returns:
    `dict`: `lds`, the mean over the queries that have a correlation; `per_query`, the correlations, NaN where the predictions or the
    outputs of a query are the same for all subsets; `n_undefined`, how many those are; `interval_low` and `interval_high`.

Examples:
    >>> metric = evaluate.load("lds")
    >>> masks = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    >>> scores = np.array([[1.0], [0.5], [-0.5], [0.1]])
    >>> outputs = np.array([[2.0], [1.0], [-1.0], [0.9]])
    >>> round(metric.compute(predictions=masks @ scores, references=outputs, n_bootstrap=0)["lds"], 3)
    0.8
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LDS(evaluate.Metric):
    """Mean Spearman correlation of predicted with true outputs of models trained on subsets."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": numbers, "references": numbers}),
            reference_urls=["https://huggingface.co/papers/2303.14186"],
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        n_bootstrap: int = 1000,
        resample: str = "subsets",
        confidence: float = 0.95,
        seed: int = 0,
    ) -> dict[str, Any]:
        predictions, references = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        _check(predictions, references, resample)
        per_query = _spearman(predictions, references)
        generator = np.random.default_rng(seed)
        count = len(predictions) if resample == "subsets" else len(per_query)
        means = []
        for rows in generator.integers(count, size=(n_bootstrap, count)):
            drawn = _spearman(predictions[rows], references[rows]) if resample == "subsets" else per_query[rows]
            means.append(_mean(drawn))
        low, high = _interval([mean for mean in means if not np.isnan(mean)], confidence)
        undefined = int(np.isnan(per_query).sum())
        return {
            "lds": _mean(per_query),
            "per_query": per_query.tolist(),
            "n_undefined": undefined,
            "interval_low": low,
            "interval_high": high,
        }


def _check(predictions: np.ndarray, references: np.ndarray, resample: str) -> None:
    if predictions.ndim != 2 or predictions.shape != references.shape or len(predictions) < 2:
        raise ValueError(
            "Expected predictions and references of one shape (n_subsets, n_query), with two subsets at least, but their shapes are "
            f"{predictions.shape} and {references.shape}."
        )
    if resample not in ("subsets", "queries"):
        raise ValueError(f"`resample` must be 'subsets' or 'queries', but is {resample!r}.")
    for name, values in (("predictions", predictions), ("references", references)):
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} {name} are not finite.")


def _spearman(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = (rankdata(values, axis=0) - (len(values) + 1) / 2 for values in (left, right))
    scale = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.divide((left * right).sum(0), scale, out=np.full(len(scale), np.nan), where=scale > 0)


def _mean(correlations: np.ndarray) -> float:
    defined = correlations[~np.isnan(correlations)]
    return float(defined.mean()) if len(defined) else float("nan")


def _interval(means: list[float], confidence: float) -> tuple[float, float]:
    if not means:
        return float("nan"), float("nan")
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
