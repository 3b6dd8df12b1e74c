"""`hf-trak explore`: an index in a browser, served to this machine alone."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.cli import output
from hf_trak.cli.main import SUCCESS
from hf_trak.cli.parsing import Collect, LoadingArguments, make_parser, name_positions, parse
from hf_trak.messages import say

if TYPE_CHECKING:
    from hf_trak.explorer.views import Explorer

_USAGE = "INDEX [--train DATASET] [--validation DATASET] [options]"
_DESCRIPTION = """\
Look at an index in a browser: ask it about rows of the training or validation set, a text, a picture or a prompt; go through the labels
that look wrong, and export the training set with those you fixed. The page is served on 127.0.0.1, to this machine alone, until Ctrl-C.
Needs pip install 'hf-trak[explore]'.

examples:
  hf-trak explore my-index                       (of an index with --keep_columns text,label)
  hf-trak explore my-index --train train.parquet --validation validation.parquet
  hf-trak explore me/my-index --port 8000 --no_browser
  hf-trak explore my-index --validation validation.parquet --push_space me/my-explorer --private
"""


@dataclass(kw_only=True)
class ExploreArguments(LoadingArguments):
    """Which index, which rows, and how it is served."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    train: str | None = field(
        default=None,
        metadata={
            "help": "The training set: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub, in any order and among other rows. "
            "An index that kept its columns needs none."
        },
    )
    validation: str | None = field(
        default=None,
        metadata={"help": "Rows to ask about, with the columns of the training set; their labels are taken to be right."},
    )
    fixed: str = field(default="hf_trak_explore", metadata={"help": "Folder for the training sets with fixed labels."})
    results: list[str] | None = field(
        default=None,
        metadata={
            "help": "Results files of this index, as `hf-trak evaluate lds` writes them, to show what was measured.",
            "action": Collect,
        },
    )
    export: str | None = field(
        default=None,
        metadata={
            "help": "Write a folder that serves the explorer by itself, also as a Space of the Hub, in place of serving it: with the index, its "
            "checkpoints, and the rows of --train and --validation."
        },
    )
    push_space: str | None = field(
        default=None,
        metadata={
            "help": "Make a Space of the Hub of it, such as me/my-explorer, in place of serving it. Everyone who sees it sees the rows."
        },
    )
    private: bool = field(default=False, metadata={"help": "Of --push_space: make a new Space private."})
    port: int | None = field(default=None, metadata={"help": "Port to serve on; by default the first free one from 7860."})
    no_browser: bool = field(default=False, metadata={"help": "Do not open a browser."})
    share: bool = field(
        default=False,
        metadata={
            "help": "Open a public address through gradio's servers: anyone who has it sees the rows, asks, and exports to this machine."
        },
    )
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training set."})
    train_split: str = field(default="train", metadata={"help": "Split of the training set."})
    validation_config: str | None = field(default=None, metadata={"help": "Configuration of the validation set."})
    validation_split: str = field(default="validation", metadata={"help": "Split of the validation set."})
    max_memory: str = field(
        default="8GB",
        metadata={"help": "Keep features in memory if they take no more; otherwise they are read at each question."},
    )


def main(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Parse and run."""
    parser = make_parser([ExploreArguments], command="explore", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: ExploreArguments) -> dict[str, Any] | None:
    """Load the index once, and serve the page until the command is interrupted; or return where it was exported to."""
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port must lie in 1 to 65535, but is {args.port}.")
    if Path(args.fixed).exists() and not Path(args.fixed).is_dir():
        raise ValueError(f"--fixed must name a folder, but {args.fixed} is a file.")
    if args.private and args.push_space is None:
        raise ValueError("--private is of --push_space: give the name of the Space, or leave it out.")

    from hf_trak.explorer.app import import_gradio, serve
    from hf_trak.explorer.space import check_folder
    from hf_trak.plots import read_rows
    from hf_trak.runtime import terminable

    import_gradio()  # before anything is loaded
    if args.export is not None:
        check_folder(args.export)
    measured = read_rows(args.results or [])
    explorer = make_explorer(args)
    if args.export is not None or args.push_space is not None:
        return export(args, explorer, measured)
    options: dict[str, Any] = {
        "port": args.port,
        "share": args.share,
        "open_browser": not args.no_browser,
        "measured": measured,
    }
    with terminable(), suppress(KeyboardInterrupt), serve(explorer, args.fixed, **options) as address:
        output.current.write("explore", SUCCESS, result={"address": address, "fixed": args.fixed})
        print(f"{explorer.index}\nExplorer: {address}\nFixed training sets: {args.fixed}\nCtrl-C ends it.", flush=True)
        threading.Event().wait()
    return None


def export(args: ExploreArguments, explorer: Explorer, measured: Sequence[Any]) -> dict[str, Any]:
    """Write the folder, push it, and return where they are."""
    from hf_trak.explorer.space import export_space, push_space

    if args.trust_remote_code or args.base is not None:
        given = "--trust_remote_code" if args.trust_remote_code else "--base"
        raise ValueError(f"{given} has no place in a Space: export an index whose checkpoints need it not.")
    pushed: str | None = None
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "space" if args.export is None else Path(args.export)
        export_space(explorer, place, models=args.model, processor=args.processor, measured=measured)
        if args.export is not None:
            say(f"Exported: {place}\nServe it with: python {place / 'app.py'}")
        if args.push_space is not None:
            pushed = push_space(place, args.push_space, private=args.private or None)
            say(f"Pushed: {pushed}")
    return {"exported": args.export, "pushed": pushed}


def make_explorer(args: ExploreArguments) -> Explorer:
    """Return the index and datasets that the flags name, loaded."""
    from hf_trak.cli.attribute import AskingArguments, load_index
    from hf_trak.cli.data import load_rows
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.explorer.views import Explorer

    quiet_libraries()
    names = ("index", "revision", "model", "base", "processor", "task", "trust_remote_code", "max_memory")
    shared: dict[str, Any] = {name: getattr(args, name) for name in names}
    index = load_index(AskingArguments(**shared))
    train = validation = None
    if args.train is not None:
        train = load_rows(args.train, split=args.train_split, config=args.train_config)
    if args.validation is not None:
        validation = load_rows(args.validation, split=args.validation_split, config=args.validation_config)
    return Explorer(index, train=train, validation=validation, max_memory=args.max_memory)
