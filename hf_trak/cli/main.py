"""`hf-trak`: picks a command, and turns errors into one line. Nothing heavy is imported until a command is chosen."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hf_trak import __version__
from hf_trak.cli.usage import INTERRUPTED, REFUSED, SUCCESS, OneLineErrors, report
from hf_trak.processes.garbage import uncollected
from hf_trak.processes.stopping import Terminated

COMMANDS = {
    "demo": "train a small classifier with mislabeled examples, and find them; or try your own model and dataset",
    "featurize": "make an index: the features of a training set under one or more checkpoints",
    "merge": "put an index together that an array of jobs has made",
    "attribute": "ask an index which training examples raised and lowered the model's output on your queries",
    "label-errors": "list the training rows of a classifier whose labels look wrong",
    "evaluate": "measure how good attributions are, against what is known",
    "push": "upload an index to a dataset repository of the Hub",
    "verify": "check that every file of an index is what was written, and say how to mend those that are not",
    "card": "write the card of an index, with what was measured of it",
}

_EPILOG = """\
Start with:
  hf-trak demo
  hf-trak featurize --help

Exit status: 0 done; 1 refused or failed, with one line that says why; 2 bad usage; 130 interrupted; 143 terminated.
HF_TRAK_DEBUG=1 or --debug, in any place, shows the traceback of an error.
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0 when done, 1 when the input is refused or something fails (one line says why), 2 for bad usage, 130 when interrupted, 143 when
    terminated.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("HF_TRAK_DEBUG", "0") not in ("", "0")
    given = [argument for argument in given if argument != "--debug"]
    position = next((i for i, argument in enumerate(given) if argument in COMMANDS), len(given))
    parser = make_parser()
    command = parser.parse_args(given[: position + 1]).command
    if command is None:
        parser.print_help()
        return 0
    try:
        with uncollected(for_good=True):
            module = importlib.import_module(f"hf_trak.cli.{command.replace('-', '_')}")
        module.main(given[position + 1 :])
    except KeyboardInterrupt:
        print("hf-trak: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Terminated as terminated:
        print("hf-trak: terminated", file=sys.stderr)
        return int(terminated.code or 0)
    except Exception as error:
        if debug:
            raise
        report(error)
        return REFUSED
    return SUCCESS


if __name__ == "__main__":
    sys.exit(main())
