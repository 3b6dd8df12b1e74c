"""Baselines: what a new attribution method is to be compared with, all called as `(train, queries) -> scores`.

```python
checkpoints = Checkpoints(["run/checkpoint-100", "run/checkpoint-200"], TrakConfig(proj_dim=4096))
scores = make_baseline("gradient_cosine", checkpoints)(train, queries)  # (n_train, n_query)
```

Positive marks a proponent. Two more need subset outputs in place of checkpoints: see [`SUBSET_FITS`].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from hf_trak.evaluation.baselines.arnoldi import ArnoldiInfluence
from hf_trak.evaluation.baselines.base import Baseline, Checkpoints
from hf_trak.evaluation.baselines.bm25 import BM25, RandomScores
from hf_trak.evaluation.baselines.ekfac import EKFACInfluence
from hf_trak.evaluation.baselines.gradient import GAS, GradientSimilarity, TracInCP
from hf_trak.evaluation.baselines.representation import PairSimilarity, RepresentationSimilarity
from hf_trak.evaluation.baselines.subsets import FromSubsets, SubsetFit, cross_fit, datamodel, empirical_influence

BASELINES: dict[str, Callable[..., Baseline]] = {
    "random": RandomScores,
    "representation_dot": partial(RepresentationSimilarity, similarity="dot"),
    "representation_cosine": partial(RepresentationSimilarity, similarity="cosine"),
    "gradient_dot": partial(GradientSimilarity, similarity="dot"),
    "gradient_cosine": partial(GradientSimilarity, similarity="cosine"),
    "output_gradient_dot": partial(GradientSimilarity, similarity="dot", train_gradient="output", query_gradient="output"),
    "output_gradient_cosine": partial(
        GradientSimilarity, similarity="cosine", train_gradient="output", query_gradient="output"
    ),
    "tracin_cp": TracInCP,
    "gas": GAS,
    "influence_arnoldi": ArnoldiInfluence,
    "influence_ekfac": EKFACInfluence,
    "bm25": BM25,
    "similarity_images": partial(PairSimilarity, of="images"),
    "similarity_captions": partial(PairSimilarity, of="captions"),
    "similarity_mean": partial(PairSimilarity, of="mean"),
}
"""Constructors by name. Each takes a [`Checkpoints`] first, and its own options by keyword."""

SUBSET_FITS: dict[str, SubsetFit] = {
    "empirical_influence": empirical_influence,
    "datamodel_l1": partial(datamodel, penalty="l1"),
    "datamodel_l2": partial(datamodel, penalty="l2"),
}
"""`(masks, outputs) -> scores` by name; wrap in [`FromSubsets`] to call with two datasets, and see [`cross_fit`] before an LDS."""


def make_baseline(name: str, checkpoints: Checkpoints | None = None, **options: Any) -> Baseline:
    """Return the baseline called `name`.

    Raises:
        ValueError: If there is no such baseline; the message lists those there are.
    """
    if name not in BASELINES:
        raise ValueError(f"Unknown baseline {name!r}; choose one of {', '.join(BASELINES)}.")
    return BASELINES[name](checkpoints, **options)


__all__ = [
    "BASELINES",
    "BM25",
    "GAS",
    "SUBSET_FITS",
    "ArnoldiInfluence",
    "Baseline",
    "Checkpoints",
    "EKFACInfluence",
    "FromSubsets",
    "GradientSimilarity",
    "PairSimilarity",
    "RandomScores",
    "RepresentationSimilarity",
    "TracInCP",
    "cross_fit",
    "datamodel",
    "empirical_influence",
    "make_baseline",
]
