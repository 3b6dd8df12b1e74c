"""From what an index or an evaluation holds to rows that plots draw: a damping choice, a spectrum, scores, labels found."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

_MOST_POINTS = 60


class Choice(Protocol):
    """A damping choice: each value tried, and how well its predictions ranked held-out outputs."""

    @property
    def grid(self) -> tuple[float, ...]: ...
    @property
    def curve(self) -> tuple[float, ...]: ...


def damping_rows(choice: Choice, *, method: str = "hf_trak") -> list[dict[str, Any]]:
    """Return the curve of `index.damping_choice()` as rows of the plot `damping_curve`."""
    pairs = zip(choice.grid, choice.curve, strict=True)
    return [_row(method, "rank_correlation", value, damping=damping) for damping, value in pairs]


def spectrum_rows(gram: Any, *, method: str = "hf_trak") -> list[dict[str, Any]]:
    """Return the eigenvalues of a Gram matrix, the largest first, as rows of the plot `spectrum`; of many, some at even steps of their
    rank's logarithm.

    Args:
        gram (`torch.Tensor`): Symmetric, as `index.members[0].gram()` returns it. Eigenvalues below the rounding of features are left out.

    Raises:
        ValueError: If no eigenvalue is positive, or one is not finite.
    """
    values = np.linalg.eigvalsh(np.asarray(gram, dtype=np.float64))[::-1]
    if not np.isfinite(values).all() or values[0] <= 0:
        raise ValueError(f"The Gram matrix has no positive eigenvalue that is finite; the largest is {values[0]:g}.")
    values = values[values > values[0] * np.finfo(np.float32).eps]
    ranks = np.arange(1, len(values) + 1)
    if len(ranks) > _MOST_POINTS:
        ranks = np.unique(np.geomspace(1, len(values), _MOST_POINTS).round().astype(int))
    return [_row(method, "eigenvalue", float(values[rank - 1]), eigenvalue_rank=int(rank)) for rank in ranks]


def score_rows(scores: Any, *, method: str = "hf_trak", n_bins: int = 40) -> list[dict[str, Any]]:
    """Return how scores are distributed, as rows of the plot `score_distribution`: the share of them in each of `n_bins` equal bins.

    Args:
        scores (`np.ndarray`): Of any shape; NaN is refused. The first and the last bin hold the 0.5 % beyond them too.

    Raises:
        ValueError: If there are none, or one is not finite.
    """
    flat = np.asarray(scores, dtype=np.float64).ravel()
    if len(flat) == 0 or not np.isfinite(flat).all():
        raise ValueError(f"Expected finite scores, but of {len(flat):,} {np.count_nonzero(~np.isfinite(flat)):,} are not.")
    low, high = np.quantile(flat, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(flat.clip(low, high), bins=n_bins, range=(low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    return [
        _row(method, "score_share", float(count / len(flat)), score=float(middle))
        for middle, count in zip(middles, counts, strict=True)
    ]


def label_error_rows(scores: Any, wrong: Any, *, method: str = "hf_trak") -> list[dict[str, Any]]:
    """Return which share of the wrong labels is among the first rows, as rows of the plot `label_errors`.

    Args:
        scores (`np.ndarray`): Of each training row, the larger the more suspicious.
        wrong (`np.ndarray`): Whether its label is wrong.

    Raises:
        ValueError: If lengths differ, a score is not finite, or no label is wrong.
    """
    suspicion, flipped = np.asarray(scores, dtype=np.float64), np.asarray(wrong, dtype=bool)
    if suspicion.shape != flipped.shape or suspicion.ndim != 1 or not np.isfinite(suspicion).all() or not flipped.any():
        raise ValueError(
            f"Expected one finite score and one flag per row, and at least one wrong label, but have scores {suspicion.shape} and flags "
            f"{flipped.shape}, of which {int(flipped.sum())} are set."
        )
    found = np.cumsum(flipped[np.argsort(-suspicion, kind="stable")]) / flipped.sum()
    n_rows = len(found)
    steps = np.unique(np.linspace(0, n_rows, min(_MOST_POINTS, n_rows + 1)).round().astype(int))
    return [
        _row(method, "flipped_found_share", float(found[n - 1]) if n else 0.0, inspected_share=float(n / n_rows)) for n in steps
    ]


def _row(method: str, metric: str, value: float, **fields: float) -> dict[str, Any]:
    return {"case": "", "method": method, "metric": metric, "value": value, "unit": "", "interval": None, **fields}
