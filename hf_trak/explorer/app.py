"""The explorer's page: tabs to ask, to mend labels, and about the index. All that it shows comes from `views`, which escapes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.explorer.about import about_html, spectrum_html
from hf_trak.explorer.labels import LabelDesk
from hf_trak.explorer.views import DIRECTIONS, SOURCES, Answer, Explorer, error_html

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
_NOTHING = "(nothing)"
_TYPED, _UPLOADED = ("text", "prompt", "pair"), ("image", "pair")
_LARGEST_UPLOAD = "20mb"

_CSS = """
.hf-trak { overflow-wrap: anywhere; }
.hf-trak section { padding: .5rem 0; }
.hf-trak .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); gap: .6rem; }
.hf-trak .row:has(img) { grid-template-columns: repeat(auto-fill, minmax(min(10rem, 100%), 1fr)); }
.hf-trak .query { display: flex; gap: 1rem; align-items: flex-start; max-width: 48rem; }
.hf-trak .card { border: 1px solid var(--border-color-primary); border-top-width: 3px; border-radius: 6px; padding: .5rem .6rem;
  background: var(--background-fill-secondary); }
.hf-trak .card { border-top-color: #8c959f; } .hf-trak .card.pro { border-top-color: #1a7f37; } .hf-trak .card.con { border-top-color: #c62f2f; }
.hf-trak h3 { margin: 1rem 0 .4rem; font-size: 1rem; } .hf-trak p { margin: .2rem 0; }
.hf-trak img { width: 7rem; height: auto; border-radius: 3px; margin: 0 0 .4rem; }
.hf-trak img.small { image-rendering: pixelated; }
.hf-trak .label, .hf-trak .decision { font-weight: 600; }
.hf-trak .meta { font-size: .85rem; color: var(--body-text-color); } .hf-trak .meta a { text-decoration: underline; }
.hf-trak .bar { display: block; height: 4px; border-radius: 2px; background: var(--border-color-primary); }
.hf-trak .bar span { display: block; height: 100%; border-radius: 2px; background: #8c959f; }
.hf-trak .pro .bar span { background: #1a7f37; } .hf-trak .con .bar span { background: #c62f2f; }
.hf-trak .note { border: 1px solid currentColor; border-radius: 1em; padding: 0 .5em; font-size: .8rem; }
.hf-trak h1 { font-size: 1.6rem; margin: .6rem 0 0; } .hf-trak h2 { font-size: 1.2rem; margin: .6rem 0 0; }
.hf-trak a, .hf-trak a:visited { color: var(--body-text-color); margin: 0; padding: 0; }
.hf-trak .wide, .hf-trak pre { overflow-x: auto; }
.hf-trak table { border-collapse: collapse; margin: .5rem 0; }
.hf-trak :is(th, td) { border: 0 solid var(--border-color-primary); border-bottom-width: 1px; text-align: left; padding: .25rem .8rem .25rem 0;
  vertical-align: top; }
.hf-trak svg { max-width: 38rem; width: 100%; color: var(--body-text-color); }
.hf-trak svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
button[role="tab"].selected, .min_value, .max_value { color: var(--body-text-color) !important; }
.hf-trak .error { border-left: 3px solid #c62f2f; padding-left: .6rem; }
"""


# Dark enough for white text.
_BUTTONS = {
    f"button_primary_{name}{scheme}": value
    for name, value in (
        ("background_fill", "*primary_600"),
        ("background_fill_hover", "*primary_700"),
        ("text_color", "white"),
        ("text_color_hover", "white"),
    )
    for scheme in ("", "_dark")
}


def import_gradio() -> Any:
    """Return gradio, with its reports to its makers switched off.

    Raises:
        ImportError: If it is missing.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The explorer needs gradio: pip install 'hf-trak[explore]'.") from error
    return gradio


def make_app(explorer: Explorer, export_folder: str | Path | None, *, measured: Sequence[Mapping[str, Any]] = ()) -> Blocks:
    """Return the page; [`serve`] starts it.

    Args:
        export_folder (`str` or `Path`, *optional*): Where fixed training sets go; without it, the page shows decisions in place of writing.
        measured (`Sequence[Mapping]`): Rows of results files, for the tab about the index.
    """
    gr = import_gradio()
    with gr.Blocks(title="hf_trak explorer", analytics_enabled=False) as app:
        gr.HTML('<div class="hf-trak"><h1>hf_trak explorer</h1></div>')
        with gr.Tabs() as tabs:
            with gr.Tab("Ask", id="ask"):
                _ask_tab(gr, app, explorer)
            with gr.Tab("Helpful and harmful", id="rows"):
                _rows_tab(gr, app, explorer)
            with gr.Tab("Label errors", id="labels"):
                _labels_tab(gr, app, LabelDesk(explorer), None if export_folder is None else Path(export_folder))
            with gr.Tab("About the index", id="about"):
                gr.HTML(about_html(explorer, measured))
                spectrum = gr.Button("Show the spectrum of the features")
                drawn = gr.HTML()
                spectrum.click(lambda: _html(lambda: spectrum_html(explorer)), None, drawn, api_name="spectrum")
        views = ("ask", "rows", "labels", "about")
        _on_load(gr, app, lambda link: [gr.Tabs(selected=link["view"]) if link.get("view") in views else gr.skip()], [tabs])
    return app


def _on_load(gr: Any, app: Any, view: Callable[[dict[str, str]], list[Any]], outputs: list[Any]) -> None:
    """Set fields by the link that the page was opened with; the last one shows that this goes on."""

    def load(request: Any) -> Any:
        found = view(dict(request.query_params))
        return found if len(found) > 1 else found[0]

    load.__annotations__["request"] = gr.Request
    shown = {"show_progress_on": outputs[-1]} if len(outputs) > 1 else {"show_progress": "hidden"}
    app.load(load, None, outputs, api_visibility="private", **shown)


def _ask_tab(gr: Any, app: Any, explorer: Explorer) -> None:
    typed = explorer.typed
    sources = [source for source in SOURCES if explorer.n_rows(source)] + ([typed] if typed else [])
    if not sources:
        gr.HTML(
            error_html(ValueError("There is nothing to ask about. Start the explorer with --train FILE or --validation FILE."))
        )
        return
    first = typed or sources[0]
    targets = ["prediction", "label", *explorer.classes]
    with gr.Row():
        source = gr.Radio(sources, value=first, label="About", scale=2)
        row = gr.Number(0, precision=0, minimum=0, label="Row", visible=first in SOURCES, scale=1)
    texts = [
        gr.Textbox(label=name.capitalize(), lines=2, visible=first in _TYPED, max_length=100_000)
        for name in explorer.text_columns
    ]
    image = gr.Image(label="Picture", type="pil", sources=["upload"], visible=first in _UPLOADED, height=220)
    with gr.Column(visible=first == "prompt") as of_answers:
        with gr.Row():
            answer = gr.Textbox(label="Answer (empty: the model answers)", max_length=100_000)
            span = gr.Textbox(label="Attribute only this part of the answer", max_length=100_000)
            other = gr.Textbox(label="Against this answer", max_length=100_000)
        heat = gr.Checkbox(False, label="Highlight what each token of the answer adds")
    with gr.Row(visible=explorer.predicts):
        target = gr.Dropdown(targets, value="prediction", label="What made the model say", interactive=True)
        against = gr.Dropdown([_NOTHING, *targets], value=_NOTHING, label="and not", interactive=True)
    direction = gr.Radio(DIRECTIONS, value="pair", label="Of the match, attribute", visible=explorer.pairs)
    top_k = gr.Slider(1, 20, value=5, step=1, label="Proponents and opponents")
    button = gr.Button("Ask", variant="primary")
    found, was_asked = gr.HTML(), gr.State(False)

    def ask(
        source: str, row: float, target: str, against: str, direction: str, top_k: float, image: Any, answer: str, span: str, other: str,
        heat: bool, *texts: str,
    ) -> tuple[str, bool]:  # fmt: skip
        some: dict[str, Any] = {"top_k": int(top_k)}
        classes = {"target": target, "against": None if against == _NOTHING else against, **some}
        given = [text or "" for text in texts]

        def found() -> Answer:
            if source in SOURCES:
                return explorer.ask_row(source, int(row or 0), direction=direction, **classes)
            if source == "image":
                return explorer.ask_image(image, **classes)
            if source == "pair":
                return explorer.ask_pair(image, given[0], direction=direction, **some)
            if source == "prompt":
                return explorer.ask_prompt(given[0], answer=answer, span=span, against=other, heat=heat, **some)
            return explorer.ask_texts(given, **classes)

        return _html(lambda: found().html()), True

    def again(was_asked: bool, *asked: Any) -> Any:
        return ask(*asked) if was_asked else (gr.skip(), gr.skip())

    def visible(source: str) -> list[Any]:
        shown = [source in SOURCES, source in _UPLOADED, source == "prompt", *[source in _TYPED for _ in texts]]
        return [gr.update(visible=is_shown) for is_shown in shown]

    asked = [source, row, target, against, direction, top_k, image, answer, span, other, heat, *texts]
    hidden = [row, image, of_answers, *texts]

    def from_link(link: dict[str, str]) -> list[Any]:
        """Answer the question of a link: of a row, a text or a prompt."""
        where, number, n_top = link.get("source", ""), link.get("row", "0"), link.get("top_k", "5")
        known = where in sources and where not in _UPLOADED and link.get("view", "ask") == "ask"
        if not known or not number.isdecimal() or not n_top.isdecimal():
            return [gr.skip()] * (len(fields) + 2)
        what = link["target"] if link.get("target") in targets else "prediction"
        against = link["against"] if link.get("against") in targets else _NOTHING
        way = link["direction"] if link.get("direction") in DIRECTIONS else "pair"
        words = [link.get("text" if i == 0 else f"text{i + 1}", "") for i in range(len(texts))]
        parts = [link.get(name, "") for name in ("answer", "span", "against")]
        n_shown = min(max(int(n_top), 1), 20)
        values: list[Any] = [where, int(number), what, against, way, n_shown, None, *parts, link.get("heat") == "1", *words]
        said = ask(*values)
        settled = dict(zip(asked, values, strict=True))
        shown = dict(zip(hidden, visible(where), strict=True))
        updates = [
            gr.update(**({"value": settled[f]} if f in settled and f is not image else {}), **shown.get(f, {})) for f in fields
        ]
        return [*updates, said[1], said[0]]

    fields = [*asked, of_answers]
    gr.on(
        [button.click, *(text.submit for text in [*texts, row, answer, span, other])],
        ask,
        asked,
        [found, was_asked],
        api_name="ask",
    )
    toggles = [field.input for field in (target, against, direction, heat)]
    gr.on(toggles, again, [was_asked, *asked], [found, was_asked], api_visibility="private")
    source.change(visible, source, hidden, api_visibility="private", show_progress="hidden")
    _on_load(gr, app, from_link, [*fields, was_asked, found])


def _rows_tab(gr: Any, app: Any, explorer: Explorer) -> None:
    sources = [source for source in reversed(SOURCES) if explorer.n_rows(source)]
    if not sources:
        gr.HTML(
            error_html(ValueError("There are no rows to ask about. Start the explorer with --train FILE or --validation FILE."))
        )
        return
    targets = ["prediction", "label", *explorer.classes]
    with gr.Row():
        source = gr.Radio(sources, value=sources[0], label="For these rows", scale=2)
        first = gr.Number(100, precision=0, minimum=1, label="The first", scale=1)
        target = gr.Dropdown(
            targets, value="prediction", label="Their output", visible=explorer.predicts, interactive=True, scale=1
        )
        top_k = gr.Slider(1, 20, value=6, step=1, label="Rows of each kind", scale=2)
    button = gr.Button("Find the training rows that help and harm", variant="primary")
    found = gr.HTML()

    def find(source: str, first: float, target: str, top_k: float) -> str:
        return _html(lambda: explorer.influence(source, int(first or 0), target=target, top_k=int(top_k)).html())

    def from_link(link: dict[str, str]) -> list[Any]:
        numbers = [link.get("first", ""), link.get("top_k", "6")]
        if link.get("view") != "rows" or link.get("source") not in sources or not all(map(str.isdecimal, numbers)):
            return [gr.skip()] * 5
        what = link["target"] if link.get("target") in targets else "prediction"
        values: list[Any] = [link["source"], int(numbers[0]), what, min(max(int(numbers[1]), 1), 20)]
        return [*values, find(*values)]

    gr.on([button.click, first.submit], find, [source, first, target, top_k], found, api_name="influence")
    _on_load(gr, app, from_link, [source, first, target, top_k, found])


def _labels_tab(gr: Any, app: Any, labels: LabelDesk, folder: Path | None) -> None:
    if reason := labels.why_no_suspects:
        gr.HTML(error_html(ValueError(reason)))
        return
    place, decisions = gr.State(0), gr.State({})
    find = gr.Button("Find labels that look wrong", variant="primary")
    with gr.Column(visible=False) as desk:
        shown = gr.HTML()
        choice = gr.Dropdown(labels.choices(), label="Right label", interactive=True)
        with gr.Row():
            keep, fix, drop = (
                gr.Button("Accept the given label"),
                gr.Button("Fix: set the right label", variant="primary"),
                gr.Button("Drop the row"),
            )
        with gr.Row():
            previous, following = gr.Button("Previous"), gr.Button("Next")
        save = gr.Button("Show the decisions" if folder is None else "Export the fixed training set")
        saved = gr.HTML()

    def view(place: int, decisions: dict[int, str | None]) -> list[Any]:
        suspect = labels.suspects()[place]
        return [
            place,
            decisions,
            labels.suspect_html(place, decisions),
            decisions.get(suspect.example.row) or suspect.suggested,
        ]

    def begin(place: int, decisions: dict[int, str | None]) -> list[Any]:
        return [gr.update(visible=True), *view(place, decisions)]

    def from_link(link: dict[str, str]) -> list[Any]:
        number = link.get("place", "")
        if link.get("view") != "labels" or not number.isdecimal() or not 1 <= int(number) <= len(labels.suspects()):
            return [gr.skip()] * 5
        return begin(int(number) - 1, {})

    def move(step: int) -> Callable[..., list[Any]]:
        def moved(place: int, decisions: dict[int, str | None]) -> list[Any]:
            return view(min(max(place + step, 0), len(labels.suspects()) - 1), decisions)

        return moved

    def decide(kind: str) -> Callable[..., list[Any]]:
        def decided(place: int, decisions: dict[int, str | None], choice: str) -> list[Any]:
            suspect = labels.suspects()[place]
            label = {"keep": suspect.given, "fix": choice, "drop": None}[kind]
            made = labels.decide(decisions, suspect.example.row, label)
            return view(min(place + 1, len(labels.suspects()) - 1), made)

        return decided

    def export(decisions: dict[int, str | None]) -> str:
        def write() -> str:
            if folder is None:
                return labels.decisions_html(decisions)
            made = f"{len(decisions)} decision{'s' * (len(decisions) != 1)}"
            return _said(f"{made}, applied: {labels.export(decisions, folder)}")

        return _html(write)

    view_of = [place, decisions, shown, choice]
    find.click(begin, [place, decisions], [desk, *view_of], api_name="find_label_errors")
    previous.click(move(-1), [place, decisions], view_of, api_name="previous")
    following.click(move(1), [place, decisions], view_of, api_name="next")
    for kind, button in (("keep", keep), ("fix", fix), ("drop", drop)):
        button.click(decide(kind), [place, decisions, choice], view_of, api_name=kind)
    save.click(export, decisions, saved, api_name="export")
    _on_load(gr, app, from_link, [desk, *view_of])


def _html(view: Callable[[], str]) -> str:
    """Return a view, or why there is none."""
    try:
        return view()
    except (ValueError, OSError, IndexError) as error:
        return error_html(error)


def _said(text: str) -> str:
    from html import escape

    return f'<div class="hf-trak"><p role="status">{escape(text)}</p></div>'


def launch_options(gr: Any) -> dict[str, Any]:
    """Return how the page is launched, wherever it is."""
    return {
        "footer_links": [], "ssr_mode": False, "run_history": False, "mcp_server": False, "pwa": False, "enable_monitoring": False,
        "max_file_size": _LARGEST_UPLOAD, "css": _CSS,
        "theme": gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]).set(**_BUTTONS),
    }  # fmt: skip


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """Make a folder; it is removed at the end if nothing is in it."""
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        if not any(path.iterdir()):
            path.rmdir()


@contextmanager
def serve(
    explorer: Explorer,
    export_folder: str | Path,
    *,
    port: int | None = None,
    share: bool = False,
    open_browser: bool = False,
    quiet: bool = True,
    measured: Sequence[Mapping[str, Any]] = (),
) -> Iterator[str]:
    """Serve the page on this machine alone, and give its address; at the end it is taken down.

    Args:
        export_folder (`str` or `Path`): Where fixed training sets go; and, while the page is served, uploaded pictures.
        port (`int`, *optional*): By default the first free one from 7860 on.
        share (`bool`): Open a tunnel of gradio's, through which anyone who has its address uses the explorer.

    Raises:
        ImportError: Without gradio.
        OSError: If the port is taken.
    """
    gr = import_gradio()
    before = os.environ.get("GRADIO_TEMP_DIR")
    with _folder(Path(export_folder)) as export, tempfile.TemporaryDirectory(prefix=".uploads-", dir=export) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # an uploaded picture lies there while the explorer runs
        app = make_app(explorer, export_folder, measured=measured)
        try:
            launched = app.queue(default_concurrency_limit=1).launch(
                server_name=HOST, server_port=port, share=share, inbrowser=open_browser, quiet=quiet, prevent_thread_lock=True,
                **launch_options(gr),
            )  # fmt: skip
            if share and not launched[2]:
                raise ConnectionError("gradio's servers gave no public address. Check the network, or leave out --share.")
            yield launched[2] or launched[1]
        except OSError as error:
            if "empty port" not in str(error):
                raise
            where = f"Port {port} is" if port is not None else "All ports from 7860 to 7959 are"
            raise OSError(f"{where} taken on this machine. Choose another with --port.") from error
        finally:
            app.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before
