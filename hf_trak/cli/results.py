"""Results files: what was measured, by which command, with which versions and on what."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_trak.messages import mask_secrets
from hf_trak.storage.files import remove_leftovers, write_atomically, write_folder


def results_of(
    name: str, arguments: Sequence[str], rows: Sequence[Mapping[str, Any]], *, versions: Mapping[str, str], hardware: str
) -> dict[str, Any]:
    """Return rows of measurements in the form of every results file.

    Args:
        name (`str`): What was measured.
        arguments (`Sequence[str]`): The command line after `hf-trak`.
        rows (`Sequence[Mapping]`): With `case`, `method`, `metric`, `value`, `unit` and `interval`. A number that is not finite becomes
            `None`, since JSON has none.
    """
    return {
        "name": name,
        "command": mask_secrets(shlex.join(["hf-trak", *arguments])),
        "commit": commit(),
        "versions": dict(versions),
        "hardware": hardware,
        "rows": [{key: _finite(value) for key, value in row.items()} for row in rows],
    }


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Write a results file so that it is either whole or not there."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_folder(path.parent)
    remove_leftovers(path.parent, lambda name: name == path.name, shared=False)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def commit() -> str | None:
    """Return the commit this package runs from, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        values = [_finite(one) for one in value]
        return None if None in values else values
    return None if isinstance(value, float) and not math.isfinite(value) else value
