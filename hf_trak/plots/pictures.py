"""Plots as pictures, by matplotlib; and `save_plots`, every plot that some results have rows for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_trak.plots.curves import PLOTS, Axis, Curve, Plot, ceiling_of, curves_of, label, limits, places, read_rows, y_ticks
from hf_trak.plots.page import render_page
from hf_trak.storage.files import write_atomically

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


def save_png(
    rows: Sequence[dict[str, Any]], path: str | Path, plot: Plot, *, title: str | None = None, mark: float | None = None
) -> None:
    """Save one plot as a picture, the legend of several curves beside it.

    Args:
        title (`str`, *optional*): By default, the plot's own.
        mark (`float`, *optional*): A place on the x axis to draw a dotted line at.

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
    _dress(axes, plot, axis, limits(curves, ceiling, log=plot.log_y))
    heading = "\n".join(textwrap.wrap(plot.title if title is None else title, 70))
    axes.set_title(heading, fontsize=12, loc="left", pad=10, parse_math=False)
    if mark is not None:
        axes.axvline(axis.place(mark), color=_GREY, linestyle=":", linewidth=1.2)
    if len(curves) > 1 or ceiling is not None:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=10, labelspacing=0.8)
    # Without versions, so that the same rows are the same file.
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15, format="png", metadata={"Software": None})


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
    if plot.log_y:
        axes.set_yscale("log")
        axes.set_ylim(10.0 ** ends[0], 10.0 ** ends[1])
        axes.set_yticks(y_ticks(*ends, log=True))
        axes.minorticks_off()
    else:
        axes.axhline(0, color="#1f2328", linewidth=0.8, zorder=0)
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
