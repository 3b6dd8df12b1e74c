"""Errors of the command line as one line: what was wrong, and where help is."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from hf_trak.plain_text import one_line

SUCCESS, REFUSED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
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
    parser.exit(BAD_USAGE, f"hf-trak: error: {one_line(where + message)}{end} See `{parser.prog} --help`.\n")


def report(error: BaseException) -> None:
    """Print an error as one line on the error stream."""
    print(f"hf-trak: error: {describe(error)}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """Return an error as one line; one that no input should cause is called so."""
    said = one_line(str(error))
    if isinstance(error, UnicodeDecodeError):
        return f"A file is not text in UTF-8: {said}. Check the files that were given; --debug shows which one was read."
    if isinstance(error, MemoryError):
        return f"Memory ran out. {said}".strip() if said else "Memory ran out. Use a smaller --batch_size or --max_memory."
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        name = one_line(str(error.filename))
        return f"{name}: {error.strerror}. Check that it is there and that you may read or write it."
    if isinstance(error, _EXPECTED) and said:
        return said
    return (
        f"{type(error).__name__}{': ' + said if said else ''}. This is not expected; run again with --debug for the traceback."
    )
