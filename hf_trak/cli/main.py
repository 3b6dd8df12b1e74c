"""`hf-trak`: picks a command, and turns errors into one line. Nothing heavy is imported until a command is chosen."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from hf_trak import __version__
from hf_trak.cli import output
from hf_trak.messages import one_line
from hf_trak.runtime import Terminated, uncollected

SUCCESS, REFUSED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_LONGEST_NAME = 300
_EXPECTED = (ValueError, OSError, MemoryError, ImportError)


class OneLineErrors(argparse.ArgumentParser):
    """A parser that reports bad usage in one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        refuse_usage(self, message)


def refuse_usage(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Print bad usage as one line, and exit with status 2."""
    command = parser.prog.removeprefix("hf-trak").strip()
    where = f"{command}: " if command else ""
    end = "" if message.endswith((".", "?")) else "."
    output.current.write(command, BAD_USAGE, error=one_line(message))
    print(f"hf-trak: error: {one_line(where + message)}{end} See `{parser.prog} --help`.", file=output.current.errors)
    parser.exit(BAD_USAGE)


def report(error: BaseException) -> None:
    """Print an error as one line on the error stream."""
    print(f"hf-trak: error: {describe(error)}", file=output.current.errors)


def describe(error: BaseException) -> str:
    """Return an error as one line; one that no input should cause is called so."""
    said = one_line(str(error))
    if isinstance(error, UnicodeDecodeError):
        return f"A file is not text in UTF-8: {said}. Check the files that were given; --debug shows which one was read."
    if isinstance(error, MemoryError):
        return f"Memory ran out. {said}".strip() if said else "Memory ran out. Use a smaller --batch_size or --max_memory."
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        name = one_line(str(error.filename))
        name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        return f"{name}: {error.strerror}. Check that it is there and that you may read or write it."
    if isinstance(error, _EXPECTED) and said:
        return said
    return (
        f"{type(error).__name__}{': ' + said if said else ''}. This is not expected; run again with --debug for the traceback."
    )


# Of no consequence: both backends of image processors are served.
_CHATTER = ("requires torchvision", "torchvision is not available", "Using a slow image processor")


def quiet_libraries() -> None:
    """Keep transformers and datasets to warnings, one line each, and hide the progress bars of loading and saving.

    torch's notes that `vmap` is slow for an operation are hidden: the engine has been chosen by its measured cost.
    """
    import datasets
    import transformers

    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    warnings.filterwarnings(
        "ignore", message="There is a performance drop because we have not yet implemented the batching rule"
    )
    for name in ("transformers", "datasets"):
        for handler in logging.getLogger(name).handlers:
            # The library's own handler: what else listens is not the command's.
            if type(handler) is logging.StreamHandler and not any(isinstance(known, _OneLine) for known in handler.filters):
                handler.addFilter(_OneLine())


class _OneLine(logging.Filter):
    """Passes each warning once, as one line."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if any(part in said for part in _CHATTER):
            return False
        line = one_line(said)
        if line in self.seen:
            return False
        self.seen.add(line)
        record.msg, record.args = line, ()
        return True


def say_which_columns() -> None:
    """Print, on standard error, the line that says which columns of a dataset are read."""
    if output.current.level > logging.WARNING:
        return
    logger = logging.getLogger("hf_trak.building.build")
    for handler in [handler for handler in logger.handlers if handler.name == "columns"]:
        logger.removeHandler(handler)  # of an earlier command of this process, whose standard error may be another
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "columns"
    handler.setFormatter(logging.Formatter("hf-trak: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


COMMANDS = {
    "demo": "train a small classifier with mislabeled examples, and find them; or try your own model and dataset",
    "featurize": "make an index: the features of a training set under one or more checkpoints",
    "merge": "put an index together that an array of jobs has made",
    "attribute": "ask an index which training examples raised and lowered the model's output on your queries",
    "explain": "let the model answer one prompt, or classify one text or image, and show the training rows behind it",
    "label-errors": "list the training rows of a classifier whose labels look wrong",
    "select": "choose the training rows that are best for a target set, or find those that hurt it",
    "explore": "look at an index in a browser: ask it about rows and texts, and mend labels that look wrong",
    "evaluate": "measure how good attributions are, against what is known",
    "push": "upload an index to a dataset repository of the Hub",
    "verify": "check that every file of an index is what was written, and say how to mend those that are not",
    "card": "write the card of an index, with what was measured of it",
    "completion": "print what makes a shell complete commands and flags",
}

_EPILOG = """\
Start with:
  hf-trak demo
  hf-trak featurize --help

Flags of every command, in any place:
  --json     print one JSON document: command, exit_status, seconds, error and result; text for people goes to standard error
  --quiet    print errors and nothing else
  --debug    show the traceback of an error, as HF_TRAK_DEBUG=1 does
HF_TRAK_VERBOSITY is the least level of messages that are shown: debug, info, warning, error or critical.

Exit status: 0 done; 1 refused or failed, with one line that says why; 2 bad usage; 130 interrupted; 143 terminated.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before a command's own arguments."""
    parser = OneLineErrors(
        prog="hf-trak",
        usage="hf-trak COMMAND [--help] [options]",
        description="Which training examples made my Hugging Face model do this?\n\n"
        + "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items()),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=tuple(COMMANDS), help="one of the above")
    parser.add_argument("--version", action="version", version=f"hf-trak {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0 when done, 1 when the input is refused or something fails (one line says why), 2 for bad usage, 130 when interrupted, 143 when
    terminated.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given, how = output.split_flags(given)
    except ValueError as error:
        report(error)
        return BAD_USAGE
    position = next((i for i, argument in enumerate(given) if argument in COMMANDS), len(given))
    parser = make_parser()
    with output.printing(how):
        command = parser.parse_args(given[: position + 1]).command
        if command is None:
            parser.print_help()
            return SUCCESS
        return _run(command, given[position + 1 :], how)


def _run(command: str, arguments: list[str], how: output.Output) -> int:
    """Run a command, and return the exit status."""
    try:
        with uncollected(for_good=True):
            module = importlib.import_module(f"hf_trak.cli.{command.replace('-', '_')}")
        result = module.main(arguments)
    except KeyboardInterrupt:
        print("hf-trak: interrupted", file=how.errors)
        how.write(command, INTERRUPTED, error="interrupted")
        return INTERRUPTED
    except Terminated as terminated:
        print("hf-trak: terminated", file=how.errors)
        how.write(command, int(terminated.code or 0), error="terminated")
        return int(terminated.code or 0)
    except Exception as error:
        how.write(command, REFUSED, error=describe(error), result=getattr(error, "result", None))
        if how.debug:
            raise
        report(error)
        return REFUSED
    how.write(command, SUCCESS, result=result)
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
