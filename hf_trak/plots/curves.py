"""What a plot shows: rows of results as curves, and axes for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple


class Plot(NamedTuple):
    """What a plot shows: rows of one metric against one of their fields."""

    x: str
    metric: str
    title: str
    x_label: str
    y_label: str
    log: bool = False
    log_y: bool = False


_LDS = "Linear datamodeling score"

PLOTS = {
    "lds_compute": Plot("compute_s", "lds", f"{_LDS} against compute", "compute, seconds", _LDS, log=True),
    "lds_proj_dim": Plot("proj_dim", "lds", f"{_LDS} against proj_dim", "proj_dim", _LDS, log=True),
    "lds_damping": Plot("damping", "lds", f"{_LDS} against damping", "damping, in mean eigenvalues", _LDS, log=True),
    "lds_members": Plot("n_members", "lds", f"{_LDS} against members", "members", _LDS, log=True),
    "lds_alpha": Plot("alpha", "lds", f"{_LDS} against alpha", "alpha, the members' share of the training set", _LDS),
    "lds_soft_threshold": Plot("soft_threshold", "lds", f"{_LDS} against soft threshold", "soft threshold", _LDS),
    "counterfactual_delta": Plot(
        "top_k",
        "counterfactual_delta",
        "Output after removing the top k",
        "training examples removed",
        "mean change of the output",
    ),
    "counterfactual_flipped_share": Plot(
        "top_k",
        "counterfactual_flipped_share",
        "Predictions flipped by removing the top k",
        "training examples removed",
        "share of predictions flipped",
    ),
    "lds_path": Plot("path_point", "lds", f"{_LDS} along the path", "point of the path, from base (0) to final (1)", _LDS),
    "damping_curve": Plot(
        "damping",
        "rank_correlation",
        "How the damping was chosen",
        "damping, in mean eigenvalues",
        "rank correlation, held-out outputs",
        log=True,
    ),
    "spectrum": Plot(
        "eigenvalue_rank",
        "eigenvalue",
        "Spectrum of the Gram matrix",
        "rank of the eigenvalue",
        "eigenvalue",
        log=True,
        log_y=True,
    ),
    "score_distribution": Plot("score", "score_share", "Distribution of scores", "score", "share of the scores"),
    "label_errors": Plot(
        "inspected_share",
        "flipped_found_share",
        "Wrong labels found",
        "share of the training set inspected",
        "share of the wrong labels found",
    ),
}
"""Plots by name. A row is drawn where its metric is the plot's and its field `x` is a number."""

CEILING_METRIC = {"lds": "lds_ceiling"}
"""Metrics that bound others; drawn as a line across."""

# Okabe and Ito's colors, which people with any color vision tell apart, less yellow, which is faint on white, and with grey in place of
# black, which a dark page would hide.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


class Point(NamedTuple):
    """One row. `low` and `high` equal `y` where it has no interval."""

    x: float
    y: float
    low: float
    high: float
    case: str


@dataclass(frozen=True)
class Curve:
    """The points of one method, in order of x."""

    method: str
    points: tuple[Point, ...]
    number: int
    """Counts the methods of all rows, so that a method looks the same in every plot."""

    @property
    def color(self) -> str:
        return COLORS[self.number % len(COLORS)]

    @property
    def round(self) -> int:
        """How often the colors were used up before this curve: its kind of line."""
        return self.number // len(COLORS)

    @property
    def ours(self) -> bool:
        return is_ours(self.method)


def is_ours(method: str) -> bool:
    """Return whether a method is drawn bold, on top: those whose names begin with hf_trak."""
    return method.startswith("hf_trak")


def read_rows(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return the rows of several result files.

    Raises:
        ValueError: If a file is not a result file; the message names it.
    """
    rows = []
    for path in paths:
        try:
            rows += json.loads(Path(path).read_text())["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file: expected JSON with a list of `rows` ({error}).") from error
    return rows


def curves_of(rows: Sequence[dict[str, Any]], plot: Plot) -> list[Curve]:
    """Return the curves of a plot, the highest at its right end first; none if no row has the metric and a number for x.

    Raises:
        ValueError: If a method has two rows at one x, or a value is not finite.
    """
    # Ours first: no other method then has its color before colors run out.
    methods = sorted(dict.fromkeys(row["method"] for row in rows), key=lambda method: not is_ours(method))
    numbers = {method: number for number, method in enumerate(methods)}
    points: dict[str, list[Point]] = {}
    for row in rows:
        x = row.get(plot.x)
        if row["metric"] == plot.metric and isinstance(x, Real) and not isinstance(x, bool):
            points.setdefault(row["method"], []).append(_point(row, float(x)))
    curves = []
    for method, found in points.items():
        found.sort()
        for first, second in pairwise(found):
            if first.x == second.x:
                raise ValueError(
                    f"{method} has two rows of {plot.metric} at {plot.x} = {first.x:g}: {first.case!r} and {second.case!r}. Draw one "
                    "setting at a time."
                )
        curves.append(Curve(method, tuple(found), numbers[method]))
    return sorted(curves, key=lambda curve: (-curve.points[-1].y, curve.method))


def _point(row: dict[str, Any], x: float) -> Point:
    y = float(row["value"])
    low, high = map(float, row["interval"] or (y, y))
    if not all(map(math.isfinite, (x, y, low, high))):
        raise ValueError(f"A row of {row['method']} is not finite: {row}.")
    return Point(x, y, low, high, row["case"])


def ceiling_of(rows: Sequence[dict[str, Any]], plot: Plot) -> float | None:
    """Return the bound of a plot's metric, if the rows hold exactly one."""
    values = {float(row["value"]) for row in rows if row["metric"] == CEILING_METRIC.get(plot.metric)}
    return values.pop() if len(values) == 1 else None


class Axis:
    """Where numbers go along x, from 0 to 1. On a logarithmic axis 0 has a place of its own, left of the smallest number.

    Args:
        values (`Sequence[float]`): All numbers to be placed.

    Raises:
        ValueError: If one is negative on a logarithmic axis.
    """

    def __init__(self, values: Sequence[float], *, log: bool) -> None:
        self.values = sorted(set(values))
        self.log = log
        if log and self.values[0] < 0:
            raise ValueError(f"A logarithmic axis has no place for {self.values[0]:g}.")
        positive = [value for value in self.values if value > 0]
        self._zero = math.log10(min(positive)) - 0.5 if log and positive else 0.0
        raw = [self._raw(value) for value in self.values]
        self._low, self._span = (min(raw), max(raw) - min(raw)) if max(raw) > min(raw) else (raw[0] - 0.5, 1.0)

    def _raw(self, value: float) -> float:
        if not self.log:
            return value
        return math.log10(value) if value > 0 else self._zero

    def place(self, value: float) -> float:
        """Return where a number goes, with a margin at either end."""
        return 0.05 + 0.9 * (self._raw(value) - self._low) / self._span

    def ticks(self, *, apart: float = 0.075) -> list[tuple[float, str]]:
        """Return places and labels, no two closer than `apart`: the numbers themselves, or round ones where these are many."""
        candidates = self.values
        if len(self.values) > 10:
            low, high = self.values[0], self.values[-1]
            candidates = _round_logs(low, high) if self.log and low > 0 else nice_ticks(low, high)
        chosen: list[tuple[float, str]] = []
        for value in candidates:
            place = self.place(value)
            if 0 <= place <= 1 and (not chosen or place - chosen[-1][0] >= apart):
                chosen.append((place, label(value)))
        return chosen


def _round_logs(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [step * 10.0**decade for decade in decades for step in steps]


def nice_ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Return about `n` round numbers from `low` to `high`."""
    raw = (high - low or 1.0) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def y_ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Return the numbers beside the y axis, given its ends as [`limits`] returns them."""
    if not log:
        return nice_ticks(low, high)
    powers = range(math.ceil(low), math.floor(high) + 1)
    step = -(-len(powers) // 8) or 1
    return [10.0**power for power in powers[::step]] or [10.0 ** ((low + high) / 2)]


def label(value: float) -> str:
    """Return a short name of a number: 0.05, 4,096, 2e+06."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def limits(curves: Sequence[Curve], ceiling: float | None, *, log: bool = False) -> tuple[float, float]:
    """Return the y axis' ends: every interval, the ceiling and zero, with a margin; of a logarithmic one, as powers of ten.

    Raises:
        ValueError: If a value of a logarithmic axis is not positive.
    """
    if log:
        values = [point.y for curve in curves for point in curve.points]
        if min(values) <= 0:
            raise ValueError(f"A logarithmic axis has no place for {min(values):g}.")
        values = [math.log10(value) for value in values]
        margin = 0.05 * (max(values) - min(values) or 1.0)
        return min(values) - margin, max(values) + margin
    values = [end for curve in curves for point in curve.points for end in (point.low, point.high)] + [0.0]
    values += [] if ceiling is None else [ceiling]
    margin = 0.05 * (max(values) - min(values) or 1.0)
    return min(values) - margin, max(values) + margin


def places(curves: Sequence[Curve], axis: Axis) -> dict[tuple[str, float], float]:
    """Return where each point goes along x. Points of several curves at one x are set side by side, or intervals would hide."""
    at: dict[float, list[str]] = {}
    for curve in curves:
        for point in curve.points:
            at.setdefault(point.x, []).append(curve.method)
    return {
        (method, x): axis.place(x) + 0.007 * (rank - (len(methods) - 1) / 2)
        for x, methods in at.items()
        for rank, method in enumerate(methods)
    }
