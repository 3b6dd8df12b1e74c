"""The explorer's page: tabs to ask, to mend labels, and about the index. All that it shows comes from `views`, which escapes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.explorer.views import SOURCES, Answer, Explorer, error_html

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
_NOTHING = "(nothing)"
_LARGEST_UPLOAD = "20mb"

_CSS = """
.hf-trak { overflow-wrap: anywhere; }
.hf-trak section { padding: .5rem 0; }
.hf-trak .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(16rem, 100%), 1fr)); gap: .6rem; }
.hf-trak .query { display: flex; gap: 1rem; align-items: flex-start; max-width: 48rem; }
.hf-trak .card { border: 1px solid var(--border-color-primary); border-top-width: 3px; border-radius: 6px; padding: .5rem .6rem;
  background: var(--background-fill-secondary); }
.hf-trak .card.pro { border-top-color: #1a7f37; } .hf-trak .card.con { border-top-color: #c62f2f; }
.hf-trak h3 { margin: 1rem 0 .4rem; font-size: 1rem; } .hf-trak p { margin: .2rem 0; }
.hf-trak img { width: 7rem; height: auto; border-radius: 3px; margin: 0 0 .4rem; }
.hf-trak img.small { image-rendering: pixelated; }
.hf-trak .label, .hf-trak .decision { font-weight: 600; }
.hf-trak .meta { font-size: .85rem; color: var(--body-text-color); } .hf-trak .meta a { text-decoration: underline; }
.hf-trak .note { border: 1px solid currentColor; border-radius: 1em; padding: 0 .5em; font-size: .8rem; }
.hf-trak table { border-collapse: collapse; margin: .5rem 0; }
.hf-trak th, .hf-trak td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }
.hf-trak .error { border-left: 3px solid #c62f2f; padding-left: .6rem; }
"""


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


def make_app(explorer: Explorer, export_folder: str | Path) -> Blocks:
    """Return the page; [`serve`] starts it.

    Args:
        export_folder (`str` or `Path`): Where fixed training sets go.
    """
    gr = import_gradio()
    with gr.Blocks(title="hf_trak explorer", analytics_enabled=False) as app:
        gr.Markdown("# hf_trak explorer")
        with gr.Tab("Ask"):
            _ask_tab(gr, app, explorer)
        with gr.Tab("Label errors"):
            _labels_tab(gr, explorer, Path(export_folder))
        with gr.Tab("About the index"):
            gr.HTML(explorer.about_html())
    return app


def _ask_tab(gr: Any, app: Any, explorer: Explorer) -> None:
    sources = [source for source in SOURCES if explorer.n_rows(source)] + ([explorer.typed] if explorer.typed else [])
    if not sources:
        gr.HTML(
            error_html(ValueError("There is nothing to ask about. Start the explorer with --train FILE or --validation FILE."))
        )
        return
    first = explorer.typed or sources[0]
    targets = ["prediction", "label", *explorer.classes]
    with gr.Row():
        source = gr.Radio(sources, value=first, label="About", scale=2)
        row = gr.Number(0, precision=0, minimum=0, label="Row", visible=first in SOURCES, scale=1)
    texts = [
        gr.Textbox(label=name.capitalize(), lines=2, visible=first in ("prompt", "text"), max_length=100_000)
        for name in (explorer.text_columns if explorer.typed in ("prompt", "text") else [])
    ]
    image = gr.Image(label="Picture", type="pil", sources=["upload"], visible=first == "image", height=220)
    with gr.Row(visible=explorer.predicts):
        target = gr.Dropdown(targets, value="prediction", label="What made the model say", interactive=True)
        against = gr.Dropdown([_NOTHING, *targets], value=_NOTHING, label="and not", interactive=True)
    top_k = gr.Slider(1, 20, value=5, step=1, label="Proponents and opponents")
    button = gr.Button("Ask", variant="primary")
    found = gr.HTML()

    def ask(source: str, row: float, target: str, against: str, top_k: float, image: Any, *texts: str) -> str:
        options: dict[str, Any] = {"target": target, "against": None if against == _NOTHING else against, "top_k": int(top_k)}

        def answer() -> Answer:
            if source in SOURCES:
                return explorer.ask_row(source, int(row or 0), **options)
            if source == "image":
                if image is None:
                    raise ValueError("Upload a picture first.")
                return explorer.ask_image(image, **options)
            return explorer.ask_texts([text or "" for text in texts], **options)

        return _html(lambda: answer().html())

    def show(source: str) -> list[Any]:
        fields = [gr.update(visible=source in SOURCES), gr.update(visible=source == "image")]
        return [*fields, *(gr.update(visible=source in ("prompt", "text")) for _ in texts)]

    def from_link(request: Any) -> list[Any]:
        """Answer the question of a link, which names a row of a dataset."""
        asked = dict(request.query_params)
        where, number = asked.get("source"), asked.get("row", "")
        if where not in sources or not number.isdecimal():
            return [gr.skip()] * (6 + len(texts))
        what = asked["target"] if asked.get("target") in targets else "prediction"
        other = asked["against"] if asked.get("against") in targets else _NOTHING
        hidden = [gr.update(visible=False)] * (1 + len(texts))
        shown = gr.update(value=int(number), visible=True)
        return [where, shown, what, other, ask(where, int(number), what, other, 5, None), *hidden]

    asked = [source, row, target, against, top_k, image, *texts]
    gr.on([button.click, *(text.submit for text in texts), row.submit], ask, asked, found, api_name="ask")
    source.change(show, source, [row, image, *texts], api_visibility="private", show_progress="hidden")
    from_link.__annotations__["request"] = gr.Request
    app.load(from_link, None, [source, row, target, against, found, image, *texts], api_visibility="private")


def _labels_tab(gr: Any, explorer: Explorer, folder: Path) -> None:
    if reason := explorer.why_no_suspects:
        gr.HTML(error_html(ValueError(reason)))
        return
    place, decisions = gr.State(0), gr.State({})
    find = gr.Button("Find labels that look wrong", variant="primary")
    with gr.Column(visible=False) as desk:
        shown = gr.HTML()
        choice = gr.Dropdown(explorer.label_choices(), label="Right label", interactive=True)
        with gr.Row():
            keep, fix, drop = (
                gr.Button("Accept the given label"),
                gr.Button("Fix: set the right label"),
                gr.Button("Drop the row"),
            )
        with gr.Row():
            previous, following = gr.Button("Previous"), gr.Button("Next")
        save = gr.Button("Export the fixed training set")
        saved = gr.HTML()

    def view(place: int, decisions: dict[int, str | None]) -> list[Any]:
        suspect = explorer.suspects()[place]
        return [
            place,
            decisions,
            explorer.suspect_html(place, decisions),
            decisions.get(suspect.example.row) or suspect.suggested,
        ]

    def begin(place: int, decisions: dict[int, str | None]) -> list[Any]:
        return [gr.update(visible=True), *view(place, decisions)]

    def move(step: int) -> Callable[..., list[Any]]:
        def moved(place: int, decisions: dict[int, str | None]) -> list[Any]:
            return view(min(max(place + step, 0), len(explorer.suspects()) - 1), decisions)

        return moved

    def decide(kind: str) -> Callable[..., list[Any]]:
        def decided(place: int, decisions: dict[int, str | None], choice: str) -> list[Any]:
            suspect = explorer.suspects()[place]
            label = {"keep": suspect.given, "fix": choice, "drop": None}[kind]
            made = explorer.decide(decisions, suspect.example.row, label)
            return view(min(place + 1, len(explorer.suspects()) - 1), made)

        return decided

    def export(decisions: dict[int, str | None]) -> str:
        def write() -> str:
            return _said(f"{len(decisions)} decisions, applied: {explorer.export(decisions, folder)}")

        return _html(write)

    view_of = [place, decisions, shown, choice]
    find.click(begin, [place, decisions], [desk, *view_of], api_name="find_label_errors")
    previous.click(move(-1), [place, decisions], view_of, api_name="previous")
    following.click(move(1), [place, decisions], view_of, api_name="next")
    for kind, button in (("keep", keep), ("fix", fix), ("drop", drop)):
        button.click(decide(kind), [place, decisions, choice], view_of, api_name=kind)
    save.click(export, decisions, saved, api_name="export")


def _html(view: Callable[[], str]) -> str:
    """Return a view, or why there is none."""
    try:
        return view()
    except (ValueError, OSError, IndexError) as error:
        return error_html(error)


def _said(text: str) -> str:
    from html import escape

    return f'<div class="hf-trak"><p role="status">{escape(text)}</p></div>'


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
        app = make_app(explorer, export_folder)
        try:
            launched = app.queue(default_concurrency_limit=1).launch(
                server_name=HOST, server_port=port, share=share, inbrowser=open_browser, quiet=quiet, prevent_thread_lock=True,
                footer_links=[], ssr_mode=False, run_history=False, mcp_server=False, pwa=False, enable_monitoring=False,
                max_file_size=_LARGEST_UPLOAD, css=_CSS,
                theme=gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]),
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
