"""`hf-trak evaluate`: picks what is measured. Nothing heavy is imported until it is known."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from hf_trak.cli.main import OneLineErrors

MEASURES = {
    "lds": "the linear datamodeling score: how well scores predict models trained on parts of the training set",
    "ftrace": "fact tracing: whether scores find the sentences that state a fact, and whether it is forgotten without them",
}
"""A measure NAME lives in `hf_trak/cli/evaluate_NAME.py`, which has `main(arguments)`."""

_EPILOG = """\
examples:
  hf-trak evaluate lds --help
  hf-trak evaluate ftrace --help
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what comes before a measure's own arguments."""
    parser = OneLineErrors(
        prog="hf-trak evaluate",
        usage="hf-trak evaluate MEASURE [--help] [options]",
        description="How good are attributions? One of:\n\n"
        + "\n".join(f"  {name:<9}{text}" for name, text in MEASURES.items()),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("measure", metavar="MEASURE", choices=tuple(MEASURES), help="one of the above")
    return parser


def main(arguments: Sequence[str]) -> Any:
    """Run one measure with the rest of the arguments, and return what it found."""
    measure = make_parser().parse_args(arguments[:1]).measure
    return importlib.import_module(f"hf_trak.cli.evaluate_{measure}").main(arguments[1:])
