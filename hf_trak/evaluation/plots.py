"""Plots of results, as pictures and as one interactive page: LDS against compute and settings, counterfactual curves.

```python
save_plots(["results/lds_cifar2.json"], "plots")  # plots/lds_compute.png, ..., plots/plots.html
```
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from hf_trak.storage.files import write_atomically


class Plot(NamedTuple):
    """What a plot shows: rows of one metric against one of their fields."""

    x: str
    metric: str
    title: str
    x_label: str
    y_label: str
    log: bool = False


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
}
"""Plots by name. A row is drawn where its metric is the plot's and its field `x` is a number."""

CEILING_METRIC = {"lds": "lds_ceiling"}
"""Metrics that bound others; drawn as a line across."""

# Okabe and Ito's colors, which people with any color vision tell apart, less yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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


def label(value: float) -> str:
    """Return a short name of a number: 0.05, 4,096, 2e+06."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def limits(curves: Sequence[Curve], ceiling: float | None) -> tuple[float, float]:
    """Return the y axis' ends: every interval, the ceiling and zero, with a margin."""
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


_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 704, 12, 348
_DASHES = ("", "7 4", "2 3", "9 3 2 3")

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-bottom: .3rem; }}
section {{ border-top: 1px solid #d1d9e0; padding: .6rem 0 1.2rem; }}
.plot {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }}
svg {{ flex: 1 1 34rem; max-width: 100%; height: auto; }}
svg text {{ font: 13px system-ui, sans-serif; fill: #1f2328; }}
ul {{ list-style: none; margin: .5rem 0; padding: 0; flex: 0 1 17rem; }}
li label {{ display: flex; gap: .5rem; align-items: center; padding: .1rem .3rem; border-radius: 4px; cursor: pointer; }}
li label:hover {{ background: #f0f2f4; }}
li svg {{ flex: none; width: 30px; height: 14px; }}
.faded {{ opacity: .12; }} .hidden {{ display: none; }}
table {{ border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15rem .7rem; border-bottom: 1px solid #d1d9e0; text-align: left; }}
p, summary {{ color: #59636e; font-size: .87rem; }} summary {{ cursor: pointer; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Point at a mark for its numbers, at a name to see it alone; untick a name to hide it. Marks at one place are set side by side.</p>
{body}
<script>
for (const section of document.querySelectorAll("section")) {{
  const groups = [...section.querySelectorAll("g[data-method]")];
  for (const entry of section.querySelectorAll("li[data-method]")) {{
    const others = groups.filter(group => group.dataset.method !== entry.dataset.method);
    const own = groups.filter(group => group.dataset.method === entry.dataset.method);
    entry.querySelector("input").addEventListener("change", event =>
      own.forEach(group => group.classList.toggle("hidden", !event.target.checked)));
    entry.addEventListener("mouseenter", () => others.forEach(group => group.classList.add("faded")));
    entry.addEventListener("mouseleave", () => others.forEach(group => group.classList.remove("faded")));
  }}
}}
</script>
</body>
</html>
"""


def render_page(rows: Sequence[dict[str, Any]], plots: Sequence[Plot], *, title: str = "Results") -> str:
    """Return a page of plots; those that no row belongs to are left out."""
    body = "\n".join(_section(rows, plot) for plot in plots if curves_of(rows, plot))
    return _PAGE.format(title=escape(title), body=body)


def _section(rows: Sequence[dict[str, Any]], plot: Plot) -> str:
    curves, ceiling = curves_of(rows, plot), ceiling_of(rows, plot)
    entries = "\n".join(map(_legend_entry, curves))
    lines = "\n".join(_table_row(curve, point) for curve in curves for point in curve.points)
    head = f"<tr><th>method</th><th>{escape(plot.x)}</th><th>{escape(plot.metric)}</th><th>interval</th><th>case</th></tr>"
    return (
        f'<section>\n<h2>{escape(plot.title)}</h2>\n<div class="plot">\n{_svg(curves, plot, ceiling)}\n<ul>\n{entries}\n</ul>\n</div>\n'
        f"<details><summary>The numbers</summary><table>{head}\n{lines}\n</table></details>\n</section>"
    )


def _svg(curves: Sequence[Curve], plot: Plot, ceiling: float | None) -> str:
    axis = Axis([point.x for curve in curves for point in curve.points], log=plot.log)
    where = places(curves, axis)
    low, high = limits(curves, ceiling)

    def down(y: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (y - low) / (high - low)

    parts = [_grid(axis, nice_ticks(low, high), down, plot)]
    if ceiling is not None:
        y = down(ceiling)
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#59636e" stroke-dasharray="6 3"/>')
        parts.append(f'<text x="{_RIGHT}" y="{y - 5:.1f}" text-anchor="end">ceiling, {ceiling:.2f}</text>')
    # Ours last, on top.
    for curve in sorted(curves, key=lambda curve: curve.ours):
        xy = [(_across(where[curve.method, point.x]), down(point.y)) for point in curve.points]
        parts.append(_series(curve, xy, [(down(point.low), down(point.high)) for point in curve.points]))
    name = escape(plot.title)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">\n' + "\n".join(parts) + "\n</svg>"


def _across(place: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * place


def _grid(axis: Axis, y_ticks: Sequence[float], down: Any, plot: Plot) -> str:
    parts = []
    for value in y_ticks:
        y, color = down(value), "#1f2328" if value == 0 else "#d1d9e0"
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for place, text in axis.ticks():
        x = _across(place)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 5}" stroke="#59636e"/>')
        parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{text}</text>')
    x_label = escape(plot.x_label + (" (logarithmic)" if plot.log else ""))
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    middle = (_TOP + _BOTTOM) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(plot.y_label)}</text>')
    return "\n".join(parts)


def _series(curve: Curve, xy: list[tuple[float, float]], ends: list[tuple[float, float]]) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in xy)
    marks = [f'<polyline points="{line}" fill="none" {_stroke(curve)}/>'] if len(xy) > 1 else []
    for point, (x, y), (low, high) in zip(curve.points, xy, ends, strict=True):
        bar = f"M{x - 3:.1f} {low:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {high:.1f}h6"
        marks.append(
            f'<path d="{bar}" stroke="{curve.color}" fill="none"/><circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if curve.ours else 4}" '
            f'fill="{curve.color}"><title>{escape(_words(curve, point))}</title></circle>'
        )
    return f'<g data-method="{curve.number}">\n' + "\n".join(marks) + "\n</g>"


def _stroke(curve: Curve) -> str:
    dash = _DASHES[curve.round % len(_DASHES)]
    width = 3 if curve.ours else 1.8
    return f'stroke="{curve.color}" stroke-width="{width}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _words(curve: Curve, point: Point) -> str:
    return f"{curve.method}\n{point.case}\n{label(point.x)}: {point.y:.3g}{_interval(point, ' ({}, {})')}"


def _interval(point: Point, form: str) -> str:
    return "" if point.low == point.high else form.format(f"{point.low:.3g}", f"{point.high:.3g}")


def _legend_entry(curve: Curve) -> str:
    sample = f'<svg viewBox="0 0 30 14"><line x1="1" x2="29" y1="7" y2="7" {_stroke(curve)}/><circle cx="15" cy="7" r="4" fill="{curve.color}"/></svg>'
    return f'<li data-method="{curve.number}"><label><input type="checkbox" checked>{sample}{escape(curve.method)}</label></li>'


def _table_row(curve: Curve, point: Point) -> str:
    cells = (curve.method, label(point.x), f"{point.y:.4g}", _interval(point, "{} to {}"), point.case)
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")
_GREY = "#59636e"


def save_plots(results: Iterable[str | Path], folder: str | Path, *, title: str = "Results") -> list[Path]:
    """Draw every plot that the results have rows for; return the paths of the pictures and, last, of the page.

    Args:
        results (`Iterable[Path]`): Result files of one setting.
        title (`str`): Heads the page, and stands above each picture.

    Raises:
        ValueError: If the results have rows for no plot.
        ImportError: If matplotlib is missing.
    """
    rows, folder = read_rows(results), Path(folder)
    names = [name for name, plot in PLOTS.items() if curves_of(rows, plot)]
    if not names:
        metrics = ", ".join(sorted({row["metric"] for row in rows})) or "none"
        wanted = ", ".join(sorted({f"{plot.metric} with a number {plot.x}" for plot in PLOTS.values()}))
        raise ValueError(f"The results have rows for no plot. Their metrics are: {metrics}. A plot needs rows of {wanted}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in names]
    for name, path in zip(names, paths, strict=True):
        save_png(rows, path, PLOTS[name], title=f"{title}: {PLOTS[name].title}")
    page = folder / "plots.html"
    text = render_page(rows, [PLOTS[name] for name in names], title=title)
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [*paths, page]


def save_png(rows: Sequence[dict[str, Any]], path: str | Path, plot: Plot, *, title: str | None = None) -> None:
    """Save one plot as a picture, its legend beside it.

    Raises:
        ValueError: If no row belongs to the plot.
        ImportError: If matplotlib is missing.
    """
    curves, ceiling = curves_of(rows, plot), ceiling_of(rows, plot)
    if not curves:
        raise ValueError(f"No row of {plot.metric} has a number for {plot.x}, so there is nothing to draw.")
    figure_class, canvas_class = _matplotlib()
    height = max(5.0, 0.36 * len(curves))  # of the legend beside it
    figure = figure_class(figsize=(7.5, height), dpi=150, facecolor="white")
    canvas_class(figure)
    axes = figure.add_subplot()
    axis = Axis([point.x for curve in curves for point in curve.points], log=plot.log)
    where = places(curves, axis)
    for curve in curves:
        _draw(axes, curve, [where[curve.method, point.x] for point in curve.points])
    if ceiling is not None:
        axes.axhline(ceiling, color=_GREY, linestyle=(0, (6, 3)), linewidth=1.2, label=f"ceiling, {ceiling:.2f}")
    axes.axhline(0, color="#1f2328", linewidth=0.8, zorder=0)
    _dress(axes, plot, axis, limits(curves, ceiling))
    heading = "\n".join(textwrap.wrap(plot.title if title is None else title, 70))
    axes.set_title(heading, fontsize=12, loc="left", pad=10, parse_math=False)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=10, labelspacing=0.8)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


def _draw(axes: Any, curve: Curve, x: list[float]) -> None:
    y = [point.y for point in curve.points]
    below = [point.y - point.low for point in curve.points]
    above = [point.high - point.y for point in curve.points]
    axes.errorbar(
        x,
        y,
        yerr=[[max(0.0, value) for value in side] for side in (below, above)],
        label="\n".join(textwrap.wrap(curve.method, 30)).replace("$", r"\$"),
        color=curve.color,
        marker=_MARKERS[curve.number % len(_MARKERS)],
        linestyle=_LINES[curve.round % len(_LINES)],
        linewidth=2.4 if curve.ours else 1.4,
        markersize=7 if curve.ours else 5.5,
        elinewidth=1.1,
        capsize=2.5,
        zorder=3 if curve.ours else 2,
    )


def _dress(axes: Any, plot: Plot, axis: Axis, ends: tuple[float, float]) -> None:
    ticks = axis.ticks()
    axes.set_xlim(0, 1)
    axes.set_ylim(*ends)
    axes.set_xticks([place for place, _ in ticks], [text for _, text in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: label(value))
    axes.set_xlabel(plot.x_label + (" (logarithmic)" if plot.log else ""), fontsize=11)
    axes.set_ylabel(plot.y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#d1d9e0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _matplotlib() -> tuple[type, type]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install 'hf-trak[plots]'.") from error
    return Figure, FigureCanvasAgg
