"""`hf-trak explore`: an index in a browser, served to this machine alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.cli.parsing import LoadingArguments, make_parser, name_positions, parse

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
    export: str = field(default="hf_trak_explore", metadata={"help": "Folder for the training sets with fixed labels."})
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


def main(arguments: Sequence[str]) -> None:
    """Parse and run."""
    parser = make_parser([ExploreArguments], command="explore", usage=_USAGE, description=_DESCRIPTION)
    run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: ExploreArguments) -> None:
    """Load the index once, and serve the page until the command is interrupted."""
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f"--port must lie in 1 to 65535, but is {args.port}.")
    if Path(args.export).exists() and not Path(args.export).is_dir():
        raise ValueError(f"--export must name a folder, but {args.export} is a file.")

    from hf_trak.explorer.app import import_gradio, serve
    from hf_trak.runtime import terminable

    import_gradio()  # before anything is loaded
    explorer = make_explorer(args)
    options: dict[str, Any] = {"port": args.port, "share": args.share, "open_browser": not args.no_browser}
    with terminable(), suppress(KeyboardInterrupt), serve(explorer, args.export, **options) as address:
        print(f"{explorer.index}\nExplorer: {address}\nFixed training sets: {args.export}\nCtrl-C ends it.", flush=True)
        threading.Event().wait()


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
