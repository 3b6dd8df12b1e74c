"""Plots as vector graphics: one for another page, or all as one interactive page that needs nothing beside it."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from hf_trak.messages import visible
from hf_trak.plots.curves import Axis, Curve, Plot, Point, ceiling_of, curves_of, label, limits, places, y_ticks

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 704, 12, 348
_DASHES = ("", "7 4", "2 3", "9 3 2 3")

_SHELL = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{policy}<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1f2328, #e6edf3); --soft: light-dark(#59636e, #9198a1); --page: light-dark(#fff, #0d1117);
  --card: light-dark(#f6f8fa, #161b22); --line: light-dark(#d1d9e0, #3d444d); }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; }} summary {{ cursor: pointer; }}
section {{ border-top: 1px solid var(--line); padding: .8rem 0 1.2rem; }}
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
{script}</body>
</html>
"""

_STYLE = """\
.plot { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
svg { flex: 1 1 34rem; max-width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
ul { list-style: none; margin: .5rem 0; padding: 0; flex: 0 1 17rem; }
li label { display: flex; gap: .5rem; align-items: center; padding: .1rem .3rem; border-radius: 4px; cursor: pointer; }
li label:hover { background: #8c959f33; }
li svg { flex: none; width: 30px; height: 14px; }
.faded { opacity: .12; } .hidden { display: none; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
p, summary { color: var(--soft); font-size: .87rem; }
"""

_SCRIPT = """
for (const section of document.querySelectorAll("section")) {
  const groups = [...section.querySelectorAll("g[data-method]")];
  for (const entry of section.querySelectorAll("li[data-method]")) {
    const others = groups.filter(group => group.dataset.method !== entry.dataset.method);
    const own = groups.filter(group => group.dataset.method === entry.dataset.method);
    entry.querySelector("input").addEventListener("change", event =>
      own.forEach(group => group.classList.toggle("hidden", !event.target.checked)));
    entry.addEventListener("mouseenter", () => others.forEach(group => group.classList.add("faded")));
    entry.addEventListener("mouseleave", () => others.forEach(group => group.classList.remove("faded")));
  }
}
"""

_INTRO = "<p>Point at a mark for its numbers, at a name to see it alone; untick a name to hide it. Marks at one place are set side by side.</p>"


def page_of(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a self-contained page. It follows the system's light or dark mode, loads nothing, and runs no script but its own.

    Args:
        title (`str`): Any text; it is escaped.
        body, style, script (`str`): As they are.
    """
    policy = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        policy = f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        script = f"<script>{script}</script>\n"
    return _SHELL.format(title=escape(visible(title)), body=body, style=style, script=script, policy=policy)


def render_page(rows: Sequence[dict[str, Any]], plots: Sequence[Plot], *, title: str = "Results") -> str:
    """Return a page of plots; those that no row belongs to are left out."""
    body = "\n".join(_section(rows, plot) for plot in plots if curves_of(rows, plot))
    return page_of(title, f"{_INTRO}\n{body}", style=_STYLE, script=_SCRIPT)


def _section(rows: Sequence[dict[str, Any]], plot: Plot) -> str:
    curves, ceiling = curves_of(rows, plot), ceiling_of(rows, plot)
    entries = "\n".join(map(_legend_entry, curves))
    lines = "\n".join(_table_row(curve, point) for curve in curves for point in curve.points)
    head = f"<tr><th>method</th><th>{escape(plot.x)}</th><th>{escape(plot.metric)}</th><th>interval</th><th>case</th></tr>"
    return (
        f'<section>\n<h2>{escape(plot.title)}</h2>\n<div class="plot">\n{_svg(curves, plot, ceiling)}\n<ul>\n{entries}\n</ul>\n</div>\n'
        f"<details><summary>The numbers</summary><table>{head}\n{lines}\n</table></details>\n</section>"
    )


def render_svg(rows: Sequence[dict[str, Any]], plot: Plot) -> str:
    """Return one plot as an `<svg>`, in the page's colours.

    Raises:
        ValueError: If no row belongs to the plot.
    """
    if not (curves := curves_of(rows, plot)):
        raise ValueError(f"No row of {plot.metric} has a number for {plot.x}, so there is nothing to draw.")
    return _svg(curves, plot, ceiling_of(rows, plot))


def _svg(curves: Sequence[Curve], plot: Plot, ceiling: float | None) -> str:
    axis = Axis([point.x for curve in curves for point in curve.points], log=plot.log)
    where = places(curves, axis)
    low, high = limits(curves, ceiling, log=plot.log_y)

    def down(y: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * ((math.log10(y) if plot.log_y else y) - low) / (high - low)

    parts = [_grid(axis, y_ticks(low, high, log=plot.log_y), down, plot)]
    if ceiling is not None:
        y = down(ceiling)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-dasharray="6 3"/>'
        )
        parts.append(f'<text x="{_RIGHT}" y="{y - 5:.1f}" text-anchor="end">ceiling, {ceiling:.2f}</text>')
    # Ours last, on top.
    for curve in sorted(curves, key=lambda curve: curve.ours):
        xy = [(_across(where[curve.method, point.x]), down(point.y)) for point in curve.points]
        parts.append(_series(curve, xy, [(down(point.low), down(point.high)) for point in curve.points]))
    name = escape(plot.title)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">\n' + "\n".join(parts) + "\n</svg>"


def _across(place: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * place


def _grid(axis: Axis, ticks: Sequence[float], down: Callable[[float], float], plot: Plot) -> str:
    parts = []
    for value in ticks:
        y, color = down(value), "currentColor" if value == 0 else "#8c959f66"
        parts.append(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>')
    for place, text in axis.ticks():
        x = _across(place)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 5}" stroke="currentColor"/>')
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
