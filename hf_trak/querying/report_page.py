"""Attributions as a page of HTML. It needs no network. A script sorts and filters it, but is not needed to read it. All text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from hf_trak.messages import visible
from hf_trak.plots.page import page_of
from hf_trak.querying.examples import Attribution, Example, Hit
from hf_trak.tasks.pictures import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

_CHARACTERS = 1200
_IMAGE_SIDE = 256
_SMALL_SIDE = 112  # of controls, which are many: as large as they are shown

_STYLE = """\
:root { --pro: light-dark(#1a7f37, #3fb950); --con: light-dark(#c62f2f, #f85149); }
h3 { font-size: .9rem; margin: 1rem 0 .4rem; }
pre.intro { white-space: pre-wrap; font: inherit; color: var(--soft); }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(WIDTH, 100%), 1fr)); gap: .6rem; }
.query { max-width: 44rem; display: flex; gap: 1rem; align-items: flex-start; }
.card { background: var(--card); border: 1px solid var(--line); border-top-width: 3px; border-radius: 6px; padding: .5rem .6rem;
  overflow-wrap: anywhere; break-inside: avoid; }
.pro { border-top-color: var(--pro); } .con { border-top-color: var(--con); }
h3.pro, .pro .score { color: var(--pro); } h3.con, .con .score { color: var(--con); }
img { width: 100%; max-width: 7rem; height: auto; border-radius: 3px; display: block; margin: 0 auto .4rem; }
img.small { image-rendering: pixelated; }
.query img { width: 7rem; margin: 0; flex: none; }
.label { font-weight: 600; } .meta { color: var(--soft); font-size: .85rem; } .score { font-variant-numeric: tabular-nums; }
.meta a { color: inherit; }
.note { display: inline-block; border: 1px solid currentColor; border-radius: 1em; padding: 0 .5em; font-size: .8rem; }
.bar { display: block; height: 4px; border-radius: 2px; background: var(--line); print-color-adjust: exact; }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--soft); }
.pro .bar span { background: var(--pro); } .con .bar span { background: var(--con); }
p { margin: .2rem 0; } .heat { white-space: pre-wrap; } .heat span { border-radius: 2px; print-color-adjust: exact; }
details { margin-top: .8rem; } footer { border-top: 1px solid var(--line); max-width: 44rem; padding-bottom: 2rem; }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: end; margin: .8rem 0; }
.tools label { display: grid; font-size: .85rem; } .tools :is(input, select) { font: inherit; padding: .15rem .3rem; }
@media print { .tools { display: none; } body { margin: 0; max-width: none; } }
"""

_SCRIPT = """
const every = selector => [...document.querySelectorAll(selector)];
const tools = Object.assign(document.createElement("div"), {className: "tools"});
const said = Object.assign(document.createElement("p"), {className: "meta"});
said.setAttribute("role", "status");
function field(name, kind, options) {
  const element = document.createElement(kind);
  for (const [value, text] of options) element.append(new Option(text, value));
  const label = Object.assign(document.createElement("label"), {textContent: name});
  element.setAttribute("aria-label", name);  // without the options
  label.append(element);
  tools.append(label);
  return element;
}
const number = (element, name) => Number(element.dataset[name]);
const orders = {
  given: (a, b) => number(a, "place") - number(b, "place"),
  up: (a, b) => number(a, "score") - number(b, "score"),
  row: (a, b) => number(a, "row") - number(b, "row"),
  label: (a, b) => a.dataset.label.localeCompare(b.dataset.label) || number(a, "place") - number(b, "place"),
  output: (a, b) => number(a, "output") - number(b, "output"),
};
const cards = every(".card"), queries = every("section[data-output]");
const groups = every(".row");
for (const group of groups) [...group.children].forEach((card, place) => card.dataset.place = place);
queries.forEach((query, place) => query.dataset.place = place);
const labels = [...new Set(cards.map(card => card.dataset.label))].filter(Boolean).sort();
const words = field("Rows with the words", "input", []);
words.type = "search";
const label = field("Label", "select", [["", "all"], ...labels.map((name, at) => [at, name])]);
const rows = field("Order of rows", "select", [["given", "strongest first"], ["up", "score, lowest first"], ["row", "row"], ["label", "label"]]);
const asked = field("Order of queries", "select", [["given", "as asked"], ["output", "output, lowest first"]]);
function filter() {
  const wanted = words.value.toLowerCase();
  for (const card of cards)
    card.hidden = !card.textContent.toLowerCase().includes(wanted) || label.value !== "" && card.dataset.label !== labels[label.value];
  const shown = cards.filter(card => !card.hidden).length;
  said.textContent = shown === cards.length ? "" : `${shown} of ${cards.length} rows are shown.`;
}
function sort(elements, order) {
  const next = elements.length ? elements[elements.length - 1].nextSibling : null;
  const parent = elements.length ? elements[0].parentNode : null;
  for (const element of [...elements].sort(orders[order])) parent.insertBefore(element, next);
}
words.addEventListener("input", filter);
label.addEventListener("change", filter);
rows.addEventListener("change", () => groups.forEach(group => sort([...group.children], rows.value)));
asked.addEventListener("change", () => sort(every("section[data-output]"), asked.value));
document.querySelector("main").before(tools, said);
let closed = [];
addEventListener("beforeprint", () => { closed = every("details:not([open])"); closed.forEach(one => one.open = true); });
addEventListener("afterprint", () => closed.forEach(one => one.open = false));
"""

_TRUST = (
    "A score is an estimate of how training on a row moved the model's output. Scores rank rows; their values are not amounts.",
    "Read the strongest rows together: the first alone is often not the most important one.",
    "A score does not say why a row had an effect, and two duplicates can each look weak.",
    "If a control returns the same rows, attribution has added nothing to it.",
    "`hf-trak evaluate lds` measures how well scores predict models trained on other subsets. Do not base a decision about a person on a "
    "score.",
)


def html_page(
    attributions: Sequence[Attribution],
    *,
    title: str,
    intro: str = "",
    suspects: Sequence[Hit] = (),
    trust: Sequence[str] = (),
    interactive: bool = True,
) -> str:
    """Return a self-contained page: images are inlined, and all text is escaped.

    Args:
        suspects (`Sequence[Hit]`): Training rows whose labels look wrong.
        trust (`Sequence[str]`): Notes on how far to trust these scores. They come before the notes that apply to all scores.
        interactive (`bool`): With the script that sorts and filters; False where the page is a part of another.
    """
    hits = [hit for one in attributions for hit in (*one.proponents, *one.opponents, *_of_controls(one))]
    most = max((abs(hit.score) for hit in hits), default=0.0)
    body = "\n".join(section(one, most) for one in attributions)
    if suspects:
        worst = max(abs(hit.score) for hit in suspects)
        cards = "\n".join(card(hit, "", worst) for hit in suspects)
        body += f'\n<section>\n<h2>Most suspicious labels</h2>\n<div class="row">\n{cards}\n</div>\n</section>'
    scale = f'<p class="meta">A full bar is a score of {most:.3g}, for all queries.</p>' if most else ""
    lines = "\n".join(f"<li>{escape(visible(text))}</li>" for text in (*trust, *_TRUST))
    foot = f"<footer>\n<h2>How far to trust this</h2>\n<ul>\n{lines}\n</ul>\n</footer>"
    with_images = any(one.query.image is not None for one in attributions)
    return page_of(
        title,
        f'<pre class="intro">{escape(intro)}</pre>\n{scale}\n<main>\n{body}\n</main>\n{foot}',
        style=_STYLE.replace("WIDTH", "10rem" if with_images else "18rem"),
        script=_SCRIPT if interactive and attributions else "",
    )


def _of_controls(attribution: Attribution) -> list[Hit]:
    return [hit for control in attribution.controls for hit in control.hits]


def section(attribution: Attribution, most: float | None = None) -> str:
    """Return a query, its training rows, and its controls as a section of HTML.

    Args:
        most (`float`, *optional*): The score of a full bar; by default the largest of this query.
    """
    if most is None:
        most = max((abs(hit.score) for hit in (*attribution.proponents, *attribution.opponents)), default=0.0)
    groups = (("pro", "Proponents: raised the output", attribution.proponents),
              ("con", "Opponents: lowered the output", attribution.opponents))  # fmt: skip
    parts = [_row(f'<h3 class="{kind}">{heading}</h3>', hits, kind, most) for kind, heading, hits in groups if hits]
    if attribution.controls:
        controls = "\n".join(
            _row(f"<h3>{escape(one.heading)}</h3>", one.hits, None, most) for one in attribution.controls if one.hits
        )
        parts.append(
            f"<details>\n<summary>Controls: rows that simpler rankings choose, with their scores</summary>\n{controls}\n</details>"
        )
    meta = f'<p class="meta">query {attribution.query.row}, output {attribution.output:+.2f}</p>'
    query = f'<div class="query">{_picture(attribution.query)}<div>{_words(attribution.query)}{meta}</div></div>'
    return f'<section data-output="{attribution.output:.6g}">\n' + "\n".join([query, *parts]) + "\n</section>"


def _row(heading: str, hits: Sequence[Hit], kind: str | None, most: float) -> str:
    if kind is None:
        cards = "\n".join(card(hit, "pro" if hit.score > 0 else "con", most, side=_SMALL_SIDE) for hit in hits)
    else:
        cards = "\n".join(card(hit, kind, most) for hit in hits)
    return f'{heading}\n<div class="row">\n{cards}\n</div>'


def card(hit: Hit, kind: str, most: float | None = None, *, side: int = _IMAGE_SIDE) -> str:
    """Return a training row and its score as HTML.

    Args:
        kind (`str`): "pro" or "con", which give its colour, or nothing.
        most (`float`, *optional*): The score of a full bar; without it there is no bar.
        side (`int`): Of its picture, at most, in pixels.
    """
    example = hit.example
    row = f"row {example.row}"
    if example.link:
        row = f'<a href="{escape(example.link)}" rel="noreferrer">{row}</a>'
    bar = ""
    if most:
        bar = f'<span class="bar" aria-hidden="true"><span style="width: {min(abs(hit.score) / most, 1):.1%}"></span></span>'
    meta = f'<p class="meta"><span class="score">{hit.score:+.3g}</span> · {row}</p>{bar}'
    data = f'data-score="{hit.score:.6g}" data-row="{example.row}" data-label="{escape(visible(example.label))}"'
    return f'<div class="card {kind}" {data}>{_picture(example, side)}{_words(example)}{_heat(hit)}{meta}</div>'


def _heat(hit: Hit) -> str:
    """Return the answer, each piece as green or red as it adds to or takes from the score."""
    most = max((abs(value) for _, value in hit.heat), default=0.0) or 1.0
    pieces = [
        f'<span title="{value:+.3g}" style="background: rgb({"46 160 67" if value > 0 else "218 54 51"} / {abs(value) / most:.2f})">'
        f"{escape(visible(piece))}</span>"
        for piece, value in hit.heat
    ]
    return f'<p class="heat">{"".join(pieces)}</p>' if pieces else ""


def _picture(example: Example, side: int = _IMAGE_SIDE) -> str:
    if example.image is None:
        return ""
    small = ' class="small"' if max(example.image.size) < 64 else ""
    return f'<img{small} alt="{escape(visible(example.label) or "image")}" src="data:image/png;base64,{_png_base64(example.image, side)}">'


def _png_base64(image: Image, side: int) -> str:
    copy = image if image.mode in ("L", "RGB", "RGBA") else to_rgb(image)
    copy = copy.copy()
    copy.thumbnail((side, side))
    buffer = io.BytesIO()
    copy.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _words(example: Example) -> str:
    parts = [f'<span class="label">{escape(visible(example.label))}</span>' if example.label else ""]
    parts += [f'<span class="note">{escape(visible(example.note))}</span>' if example.note else ""]
    text = shorten(example.text, _CHARACTERS)
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


def shorten(text: str, limit: int) -> str:
    """Return a text as one line of at most so many characters."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
