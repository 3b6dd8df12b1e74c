r"""Baselines that see no model, only what models trained on random subsets said: empirical influence and datamodels.

From `masks` (n_subsets, n_train), which subset held which example, and `outputs` (n_subsets, n_query), the query's output after
training on each subset. They cost as many trainings as there are subsets.

Caveat: the linear datamodeling score ranks subsets by these same outputs. Scores that were fitted to a subset must not be judged by
it; [`cross_fit`] gives scores with the subsets each has not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Float64, Int64, Shaped

from hf_trak.evaluation.baselines.base import check_scores

SubsetFit = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`(masks, outputs) -> scores`."""


def empirical_influence(
    masks: Shaped[np.ndarray, "n_subsets n_train"], outputs: Float[np.ndarray, "n_subsets n_query"]
) -> Float64[np.ndarray, "n_train n_query"]:
    r"""Return the mean output of the models that saw an example, less the mean of those that did not.

    $\tau(z_i, z) = \mathbb{E}_S[f(z; S) \mid z_i \in S] - \mathbb{E}_S[f(z; S) \mid z_i \notin S]$. Source: Feldman and Zhang (2020),
    [What neural networks memorize and why: discovering the long tail via influence estimation](https://huggingface.co/papers/2008.03703).

    Args:
        masks (`np.ndarray`): True or 1 where a subset holds an example.
        outputs (`np.ndarray`): One row per subset; average over the seeds of a subset first.

    Raises:
        ValueError: If the shapes disagree, an output is not finite, or an example is in all subsets or in none.
    """
    masks, outputs = _check(masks, outputs)
    n_with = masks.sum(0)
    n_without = len(masks) - n_with
    stuck = np.flatnonzero((n_with == 0) | (n_without == 0))
    if len(stuck):
        raise ValueError(
            f"{len(stuck)} training examples, such as row {stuck[0]}, are in all of the {len(masks)} subsets or in none, so nothing "
            "can be said of them. Train on more subsets."
        )
    # The difference does not depend on a constant; without it, large outputs do not cancel.
    centered = outputs - outputs.mean(0)
    included = masks.astype(np.float64)
    return included.T @ centered / n_with[:, None] - (1 - included).T @ centered / n_without[:, None]


def datamodel(
    masks: Shaped[np.ndarray, "n_subsets n_train"],
    outputs: Float[np.ndarray, "n_subsets n_query"],
    *,
    penalty: Literal["l1", "l2"] = "l1",
    n_penalties: int = 20,
    n_folds: int = 5,
) -> Float64[np.ndarray, "n_train n_query"]:
    r"""Return the weights of a regularised linear regression of each query's output on the masks.

    $\tau(\cdot, z) = \arg\min_w \frac1m \sum_S (w^\top 1_S + b - f(z; S))^2 + \lambda \lVert w \rVert$, with λ chosen for each query
    within the given subsets: by cross-validation for `"l1"` (scikit-learn's `LassoCV`), by leaving out one subset at a time for
    `"l2"` (`RidgeCV`). Source: Ilyas et al. (2022), [Datamodels](https://huggingface.co/papers/2202.00622).

    Args:
        outputs (`np.ndarray`): One row per subset; average over the seeds of a subset first.
        penalty (`"l1"` or `"l2"`): The norm; the paper's is `"l1"`.
        n_penalties (`int`): Values of λ tried: two decades below the smallest that leaves no weight for `"l1"`, three decades on
            either side of the masks' mean nonzero eigenvalue for `"l2"`.
        n_folds (`int`): Of the cross-validation for `"l1"`.

    Raises:
        ImportError: If scikit-learn is missing.
        ValueError: If the shapes disagree, an output is not finite, or there are fewer subsets than folds.
    """
    if penalty not in ("l1", "l2"):
        raise ValueError(f"`penalty` must be 'l1' or 'l2', but is {penalty!r}.")
    masks, outputs = _check(masks, outputs)
    if len(masks) < max(3, n_folds):
        raise ValueError(f"{len(masks)} subsets are too few for {n_folds} folds: train on more subsets, or set `n_folds`.")
    # Centered, the intercept is gone; scaled, one tolerance serves queries of any size.
    included = masks - masks.mean(0)
    centered = outputs - outputs.mean(0)
    scale = outputs.std(0)
    varies = scale > 1e-12 * (1 + np.abs(outputs).max(0))  # the others are the same whatever the subset: nothing has influence
    weights = np.zeros((masks.shape[1], outputs.shape[1]))
    if varies.any() and included.any():
        targets = centered[:, varies] / scale[varies]
        fit = _lasso(included, targets, n_penalties, n_folds) if penalty == "l1" else _ridge(included, targets, n_penalties)
        weights[:, varies] = fit * scale[varies]
    return weights


def _lasso(included: np.ndarray, targets: np.ndarray, n_penalties: int, n_folds: int) -> np.ndarray:
    linear_model, model_selection = _sklearn()
    folds = model_selection.KFold(n_folds, shuffle=True, random_state=0)
    weights = []
    for target in targets.T:
        largest = np.abs(included.T @ target).max() / len(target)
        model = linear_model.LassoCV(alphas=largest * np.logspace(-2, 0, n_penalties), cv=folds, max_iter=10_000, tol=1e-3)
        weights.append(model.fit(included, target).coef_)
    return np.stack(weights, axis=1)


def _ridge(included: np.ndarray, targets: np.ndarray, n_penalties: int) -> np.ndarray:
    linear_model, _ = _sklearn()
    mean_eigenvalue = np.square(included).sum() / min(included.shape)
    grid = mean_eigenvalue * np.logspace(-3, 3, n_penalties)
    return linear_model.RidgeCV(alphas=grid, alpha_per_target=True).fit(included, targets).coef_.reshape(targets.shape[1], -1).T


def _sklearn() -> tuple[Any, Any]:
    try:
        from sklearn import linear_model, model_selection
    except ImportError as error:
        raise ImportError("Datamodels need scikit-learn: pip install 'hf-trak[baselines]'.") from error
    return linear_model, model_selection


class Fold(NamedTuple):
    """Scores, and the subsets that had no part in them."""

    scores: Float64[np.ndarray, "n_train n_query"]
    held_out: Int64[np.ndarray, " n_held_out"]


def cross_fit(
    fit: SubsetFit,
    masks: Shaped[np.ndarray, "n_subsets n_train"],
    outputs: Float[np.ndarray, "n_subsets n_query"],
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> list[Fold]:
    """Fit on all subsets but a fold's, for each fold; every subset is held out once.

    Compute the linear datamodeling score of each fold's scores on its `held_out` subsets alone, and average.

    Args:
        fit (`Callable`): [`empirical_influence`], [`datamodel`] or a `functools.partial` of it.

    Raises:
        ValueError: If there are fewer than 2 folds, or fewer than 2 subsets to a fold.
    """
    masks, outputs = _check(masks, outputs)
    if n_folds < 2 or len(masks) < 2 * n_folds:
        raise ValueError(
            f"{len(masks)} subsets in {n_folds} folds: at least 2 folds are needed, and 2 subsets in each to rank. Set `n_folds`."
        )
    folds = np.array_split(np.random.default_rng(seed).permutation(len(masks)), n_folds)
    return [
        Fold(fit(np.delete(masks, held_out, axis=0), np.delete(outputs, held_out, axis=0)), np.sort(held_out))
        for held_out in folds
    ]


@dataclass(frozen=True)
class FromSubsets:
    """A fit to subset outputs as a baseline of two datasets, which must be those that the subsets and outputs are of.

    Args:
        masks (`np.ndarray`): Of the training set that will be passed.
        outputs (`np.ndarray`): Of the queries that will be passed.
        fit (`Callable`): As for [`cross_fit`].
    """

    masks: Shaped[np.ndarray, "n_subsets n_train"]
    outputs: Float[np.ndarray, "n_subsets n_query"]
    fit: SubsetFit = empirical_influence

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        expected = self.masks.shape[1], self.outputs.shape[1]
        if (len(train), len(queries)) != expected:
            raise ValueError(
                f"These subsets are of {expected[0]} training examples and {expected[1]} queries, but {len(train)} and "
                f"{len(queries)} were given. Pass the datasets that the subsets were drawn from."
            )
        return check_scores(self.fit(self.masks, self.outputs), train, queries)


def _check(masks: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if masks.ndim != 2 or outputs.ndim != 2 or len(masks) != len(outputs) or 0 in masks.shape or 0 in outputs.shape:
        raise ValueError(
            "`masks` must be (n_subsets, n_train) and `outputs` (n_subsets, n_query), none of them empty, but they are "
            f"{masks.shape} and {outputs.shape}."
        )
    if not np.isin(masks, (0, 1)).all():
        raise ValueError("`masks` must hold True and False, or 1 and 0, but holds other values.")
    if not np.isfinite(outputs).all():
        bad = np.flatnonzero(~np.isfinite(outputs).all(1))
        raise ValueError(f"The outputs of {len(bad)} subsets, such as subset {bad[0]}, are not finite. Train them again.")
    return masks.astype(bool), outputs.astype(np.float64)
