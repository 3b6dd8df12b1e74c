"""Attributions as a table for the terminal and as a picture, and the two files of a report: pure functions of what is to be shown."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_trak.messages import visible
from hf_trak.querying.examples import Attribution, Example, Hit
from hf_trak.querying.report_page import html_page, shorten
from hf_trak.storage.files import remove_leftovers, write_atomically, write_folder
from hf_trak.tasks.pictures import to_rgb

_TABLE_WIDTH = 110
_PNG_CHARACTERS = 110
_PNG_CAPTION_CHARACTERS = 100
_PNG_QUERIES = 5
_PNG_TEXTS = 3  # proponents and opponents, where each is a text
_GREEN, _RED, _GREY = "#1a7f37", "#c62f2f", "#6e7781"


def table(attributions: Sequence[Attribution]) -> str:
    """Return a table for the terminal: per query, its proponents (+) and opponents (-)."""
    blocks = []
    for attribution in attributions:
        output = f"   output {attribution.output:+.2f}"
        lines = ["Query " + _line(attribution.query, _TABLE_WIDTH - len("Query ") - len(output)) + output]
        for hits, sign in ((attribution.proponents, "+"), (attribution.opponents, "-")):
            lines += [f"  {sign} {hit.score:>+10.3g}   {_line(hit.example, _TABLE_WIDTH - 17)}" for hit in hits]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def suspects_table(suspects: Sequence[Hit]) -> str:
    """Return a table of the training examples whose labels are most suspicious, the worst first."""
    lines = [f"  {hit.score:>10.3g}   {_line(hit.example, _TABLE_WIDTH - 15)}" for hit in suspects]
    return "\n".join(["Most suspicious labels, by self-influence", *lines])


def label_errors_table(suspects: Sequence[tuple[Example, str | None, float, float]]) -> str:
    """Return a table of training examples, each with a suggested label, where there is one, its suspicion and the model's doubt of the
    given label."""
    lines = ["Most suspicious labels", "   score   1 - p   row and given label -> suggested label"]
    for example, suggested, score, doubt in suspects:
        shown = example if suggested is None else replace(example, label=f"{example.label} -> {suggested}")
        lines.append(f"  {score:>6.3f}  {doubt:>6.3f}   {_line(shown, _TABLE_WIDTH - 19)}")
    return "\n".join(lines)


def _line(example: Example, width: int) -> str:
    parts = [f"row {example.row:>6}"]
    parts += [f"[{visible(example.label)}]"] if example.label else []
    parts += [f"({visible(example.note)})"] if example.note else []
    parts += [" ".join(visible(example.text).split())] if example.text else []
    line = "  ".join(parts)
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def save_png(attributions: Sequence[Attribution], path: str | Path, *, title: str = "") -> None:
    """Save a grid: one row per query, the query first, then its proponents, then its opponents.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure_class, canvas_class = _matplotlib()
    with_images = any(attribution.query.image is not None for attribution in attributions)
    with_captions = any(a.query.image is not None and a.query.text for a in attributions)
    width, height = (1.25, 2.55 if with_captions else 1.75) if with_images else (2.3, 1.45)
    if not with_images:
        attributions = [
            replace(a, proponents=a.proponents[:_PNG_TEXTS], opponents=a.opponents[:_PNG_TEXTS]) for a in attributions
        ]
    n_pro = max((len(attribution.proponents) for attribution in attributions), default=0)
    n_con = max((len(attribution.opponents) for attribution in attributions), default=0)
    n_columns, n_rows = 1 + n_pro + n_con, max(1, len(attributions))
    figure = figure_class(figsize=(width * n_columns + 0.4, height * n_rows + 0.9), dpi=120, facecolor="white")
    canvas_class(figure)
    cells = figure.subplots(n_rows, n_columns, squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    for row, attribution in zip(cells, attributions, strict=False):
        _draw(row[0], attribution.query, f"output {attribution.output:+.2f}", "black")
        for cell, hit in zip(row[1:], attribution.proponents, strict=False):
            _draw(cell, hit.example, f"{hit.score:+.2g}", _GREEN)
        for cell, hit in zip(row[1 + n_pro :], attribution.opponents, strict=False):
            _draw(cell, hit.example, f"{hit.score:+.2g}", _RED)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.85 / figure.get_figheight(), bottom=0.02, wspace=0.12, hspace=0.45)
    _head(figure, title, {"query": (0, "black"), "proponents": (1, _GREEN), "opponents": (1 + n_pro, _RED)}, n_columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks shows as boxes; the page has it whole
        figure.savefig(path, format="png")


def _head(figure: Any, title: str, columns: dict[str, tuple[int, str]], n_columns: int) -> None:
    top = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / top, title, ha="left", va="top", fontsize=11)
    for name, (column, color) in columns.items():
        if column < n_columns:
            figure.text(
                0.01 + 0.98 * column / n_columns, 1 - 0.36 / top, name, color=color, va="top", fontsize=9, fontweight="bold"
            )


def _draw(cell: Any, example: Example, caption: str, color: str) -> None:
    heading = visible(" ".join(filter(None, [example.label, f"({example.note})" if example.note else ""])))
    title = "\n".join([*textwrap.wrap(heading, 24)[:2], caption])
    cell.set_title(title, fontsize=7.5, color=color, pad=3, loc="left" if example.image is None else "center", parse_math=False)
    if example.image is not None:
        cell.imshow(to_rgb(example.image), interpolation="nearest" if max(example.image.size) < 64 else None)
        lines = textwrap.wrap(shorten(example.text, _PNG_CAPTION_CHARACTERS), 21)
        if lines:  # as far below a low picture as below a high one
            cell.set_anchor("N")
            cell.annotate(
                "\n".join(lines), (0.5, 0), xytext=(0, -3), xycoords="axes fraction", textcoords="offset points", ha="center",
                va="top", fontsize=6, color="black", parse_math=False,
            )  # fmt: skip
        return
    text = shorten(example.text, _PNG_CHARACTERS) or f"row {example.row}"
    cell.set(xlim=(0, 1), ylim=(0, 1))
    cell.text(0, 0.97, "\n".join(textwrap.wrap(text, 28)), va="top", fontsize=7.5, color="black", parse_math=False)


def _matplotlib() -> tuple[type, type]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: pip install 'hf-trak[demo]'.") from error
    return Figure, FigureCanvasAgg


def save_report(
    attributions: Sequence[Attribution],
    folder: str | Path,
    *,
    title: str,
    intro: str = "",
    suspects: Sequence[Hit] = (),
    trust: Sequence[str] = (),
) -> list[Path]:
    """Save `report.png` (of the first queries) and `report.html` into a folder and return their paths."""
    folder = Path(folder)
    write_folder(folder)
    remove_leftovers(folder, lambda name: name in ("report.html", "report.png"), shared=False)
    page, picture = folder / "report.html", folder / "report.png"
    text = html_page(attributions, title=title, intro=intro, suspects=suspects, trust=trust)
    write_atomically(picture, lambda temporary: save_png(attributions[:_PNG_QUERIES], temporary, title=title))
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [picture, page]
