"""Attributions as a table for the terminal, a page of HTML and a picture: pure functions of what is to be shown."""

from __future__ import annotations

import base64
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.messages import visible
from hf_trak.querying.examples import Attribution, Example, Hit
from hf_trak.storage.files import remove_leftovers, write_atomically, write_folder
from hf_trak.tasks.pictures import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

_TABLE_WIDTH = 110
_HTML_CHARACTERS = 1200
_PNG_CHARACTERS = 110
_PNG_CAPTION_CHARACTERS = 100
_PNG_QUERIES = 5
_PNG_TEXTS = 3  # proponents and opponents, where each is a text
_IMAGE_SIDE = 256
_GREEN, _RED, _GREY = "#1a7f37", "#c62f2f", "#6e7781"

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0;
  --pro: #1a7f37; --con: #c62f2f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22;
  --line: #3d444d; --pro: #3fb950; --con: #f85149; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; }} h3 {{ font-size: .9rem; margin: 1rem 0 .4rem; }}
pre.intro {{ white-space: pre-wrap; font: inherit; color: var(--soft); }}
section {{ border-top: 1px solid var(--line); padding: 1rem 0 1.5rem; }}
.row {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({width}, 1fr)); gap: .6rem; }}
.query {{ max-width: 44rem; display: flex; gap: 1rem; align-items: flex-start; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-top-width: 3px; border-radius: 6px; padding: .5rem .6rem;
  overflow-wrap: anywhere; }}
.pro {{ border-top-color: var(--pro); }} .con {{ border-top-color: var(--con); }}
h3.pro, .pro .score {{ color: var(--pro); }} h3.con, .con .score {{ color: var(--con); }}
img {{ width: 100%; max-width: 7rem; height: auto; border-radius: 3px; display: block; margin: 0 auto .4rem; }}
img.small {{ image-rendering: pixelated; }}
.query img {{ width: 7rem; margin: 0; flex: none; }}
.label {{ font-weight: 600; }} .meta {{ color: var(--soft); font-size: .85rem; }} .score {{ font-variant-numeric: tabular-nums; }}
.note {{ display: inline-block; border: 1px solid currentColor; border-radius: 1em; padding: 0 .5em; font-size: .8rem; }}
p {{ margin: .2rem 0; }} .heat {{ white-space: pre-wrap; }} .heat span {{ border-radius: 2px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<pre class="intro">{intro}</pre>
{body}
</body>
</html>
"""


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


def html_page(attributions: Sequence[Attribution], *, title: str, intro: str = "", suspects: Sequence[Hit] = ()) -> str:
    """Return a page that needs nothing beside it: images are inlined, and every text is escaped."""
    body = "\n".join(map(section, attributions))
    if suspects:
        cards = "\n".join(card(hit, "") for hit in suspects)
        body += f'\n<section>\n<h2>Most suspicious labels</h2>\n<div class="row">\n{cards}\n</div>\n</section>'
    with_images = any(attribution.query.image is not None for attribution in attributions)
    return _PAGE.format(title=escape(visible(title)), intro=escape(intro), body=body, width="10rem" if with_images else "18rem")


def section(attribution: Attribution) -> str:
    """Return a query and its training rows as a section of HTML; every text is escaped."""
    groups = (("pro", "Proponents: raised the output", attribution.proponents),
              ("con", "Opponents: lowered the output", attribution.opponents))  # fmt: skip
    rows = [
        f'<h3 class="{kind}">{heading}</h3>\n<div class="row">\n' + "\n".join(card(hit, kind) for hit in hits) + "\n</div>"
        for kind, heading, hits in groups
        if hits
    ]
    meta = f'<p class="meta">query {attribution.query.row}, output {attribution.output:+.2f}</p>'
    query = f'<div class="query">{_picture(attribution.query)}<div>{_words(attribution.query)}{meta}</div></div>'
    return "<section>\n" + "\n".join([query, *rows]) + "\n</section>"


def card(hit: Hit, kind: str) -> str:
    """Return a training row and its score as HTML; every text is escaped."""
    meta = f'<p class="meta"><span class="score">{hit.score:+.3g}</span> · row {hit.example.row}</p>'
    return f'<div class="card {kind}">{_picture(hit.example)}{_words(hit.example)}{_heat(hit)}{meta}</div>'


def _heat(hit: Hit) -> str:
    """Return the answer, each piece as green or red as it adds to or takes from the score."""
    most = max((abs(value) for _, value in hit.heat), default=0.0) or 1.0
    pieces = [
        f'<span title="{value:+.3g}" style="background: rgb({"46 160 67" if value > 0 else "218 54 51"} / {abs(value) / most:.2f})">'
        f"{escape(visible(piece))}</span>"
        for piece, value in hit.heat
    ]
    return f'<p class="heat">{"".join(pieces)}</p>' if pieces else ""


def _picture(example: Example) -> str:
    if example.image is None:
        return ""
    small = ' class="small"' if max(example.image.size) < 64 else ""
    return f'<img{small} alt="{escape(visible(example.label) or "image")}" src="data:image/png;base64,{_png_base64(example.image)}">'


def _png_base64(image: Image) -> str:
    copy = image if image.mode in ("L", "RGB", "RGBA") else to_rgb(image)
    copy = copy.copy()
    copy.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    copy.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _words(example: Example) -> str:
    parts = [f'<span class="label">{escape(visible(example.label))}</span>' if example.label else ""]
    parts += [f'<span class="note">{escape(visible(example.note))}</span>' if example.note else ""]
    text = _shorten(example.text, _HTML_CHARACTERS)
    before, after = (_around(one) for one in (example.before, example.after))
    begin, end = (" " if one and text and example.text[place].isspace() else "" for one, place in ((before, 0), (after, -1)))
    shown = f"<p>{before}{begin}{escape(text)}{end}{after}</p>" if text else ""
    return f"<p>{' '.join(filter(None, parts))}</p>" + shown


def _around(text: str) -> str:
    """Return the text around a chunk as HTML, its spaces at the ends kept."""
    if not text:
        return ""
    flat = f"{' ' * text[0].isspace()}{' '.join(text.split())}{' ' * text[-1].isspace()}"
    return f'<span class="around" style="opacity: .6">{escape(visible(flat))}</span>'


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
        lines = textwrap.wrap(_shorten(example.text, _PNG_CAPTION_CHARACTERS), 21)
        if lines:  # as far below a low picture as below a high one
            cell.set_anchor("N")
            cell.annotate(
                "\n".join(lines), (0.5, 0), xytext=(0, -3), xycoords="axes fraction", textcoords="offset points", ha="center",
                va="top", fontsize=6, color="black", parse_math=False,
            )  # fmt: skip
        return
    text = _shorten(example.text, _PNG_CHARACTERS) or f"row {example.row}"
    cell.set(xlim=(0, 1), ylim=(0, 1))
    cell.text(0, 0.97, "\n".join(textwrap.wrap(text, 28)), va="top", fontsize=7.5, color="black", parse_math=False)


def _shorten(text: str, limit: int) -> str:
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


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
) -> list[Path]:
    """Save `report.png` (of the first queries) and `report.html` into a folder and return their paths."""
    folder = Path(folder)
    write_folder(folder)
    remove_leftovers(folder, lambda name: name in ("report.html", "report.png"), shared=False)
    page, picture = folder / "report.html", folder / "report.png"
    text = html_page(attributions, title=title, intro=intro, suspects=suspects)
    write_atomically(picture, lambda temporary: save_png(attributions[:_PNG_QUERIES], temporary, title=title))
    write_atomically(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return [picture, page]
