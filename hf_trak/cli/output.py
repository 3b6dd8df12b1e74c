"""What a command prints: text for people, or one JSON document for machines; and how much of it (`--json`, `--quiet`, `HF_TRAK_VERBOSITY`)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

VERBOSITY = "HF_TRAK_VERBOSITY"
LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}
FLAGS = ("--debug", "--json", "--quiet")


class Output:
    """How a command of this process prints.

    Args:
        as_json (`bool`): Standard output has one JSON document; text for people goes to standard error.
        quiet (`bool`): Text for people is left out, and so are progress bars and messages below errors.
        debug (`bool`): Errors are raised, with their traceback.
        level (`int`): Of messages of the logger `hf_trak` that are shown.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, debug: bool = False, level: int = logging.WARNING
    ) -> None:
        self.as_json, self.quiet, self.debug, self.level = as_json, quiet, debug, level
        self.stdout: Any = None  # the streams of the process, of which text for people may be turned away
        self.stderr: Any = None
        self.begin = time.perf_counter()
        self.written = False

    @property
    def errors(self) -> Any:
        """Where errors go."""
        return self.stderr or sys.stderr

    def write(self, command: str, status: int, *, result: Any = None, error: str | None = None) -> None:
        """Print the JSON document, once. Of several processes of a launcher, the first one prints."""
        if not self.as_json or self.written or os.environ.get("RANK", "0") != "0":
            return
        import json  # not before help is shown

        self.written = True
        seconds = round(time.perf_counter() - self.begin, 3)
        found = {"command": command, "exit_status": status, "seconds": seconds, "error": error, "result": _plain(result)}
        print(json.dumps(found, ensure_ascii=True, allow_nan=False), file=self.stdout or sys.stdout, flush=True)


current = Output()
"""Of the command that runs."""


def split_flags(arguments: Sequence[str]) -> tuple[list[str], Output]:
    """Return arguments without the flags that every command takes, in any place, and what these and the environment say.

    Raises:
        ValueError: If HF_TRAK_VERBOSITY is no level.
    """
    given = set(arguments) & set(FLAGS)
    name = os.environ.get(VERBOSITY, "").strip().lower() or "warning"
    if name not in LEVELS:
        raise ValueError(f"{VERBOSITY} must be one of {', '.join(LEVELS)}, but is {name!r}.")
    quiet = "--quiet" in given
    output = Output(
        as_json="--json" in given,
        quiet=quiet,
        debug="--debug" in given or os.environ.get("HF_TRAK_DEBUG", "0") not in ("", "0"),
        level=max(LEVELS[name], logging.ERROR) if quiet else LEVELS[name],
    )
    return [argument for argument in arguments if argument not in FLAGS], output


@contextlib.contextmanager
def printing(output: Output) -> Iterator[None]:
    """Print as `output` says, until the end."""
    global current
    before, current = current, output
    output.stdout, output.stderr = sys.stdout, sys.stderr
    logger = logging.getLogger("hf_trak")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("hf-trak: %(levelname)s: %(message)s"))
    handler.setLevel(output.level)
    earlier = logger.level
    with contextlib.ExitStack() as stack:
        if VERBOSITY in os.environ or output.quiet:
            logger.addHandler(handler)
            logger.setLevel(output.level)
            stack.callback(logger.setLevel, earlier)
            stack.callback(logger.removeHandler, handler)
        if output.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))  # where progress bars go
        elif output.as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            current = before


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite are null, and paths are texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
