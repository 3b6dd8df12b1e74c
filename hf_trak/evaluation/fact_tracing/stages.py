"""A folder of stages: what is done is not done again, and what it took is written down."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_trak.storage.differences import list_differences
from hf_trak.storage.files import read_json, write_json

_LOG = "stages.jsonl"
_SETTINGS = "ftrace.json"


def begin(folder: Path, identity: dict[str, object]) -> None:
    """Take a folder for an evaluation, or go on with it.

    Raises:
        ValueError: If it was begun with other settings; the message lists what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    wanted = json.loads(json.dumps(identity))
    if path.exists() and (found := read_json(path)) != wanted:
        differences = "\n".join(f"  {line}" for line in list_differences(found, wanted))
        raise ValueError(f"{folder} was begun with other settings:\n{differences}\nChoose another folder.")
    if not path.exists():
        write_json(path, wanted)


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Write down the CPU and wall seconds of what is done inside, if it took any."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        with open(folder / _LOG, "a") as log:
            log.write(json.dumps({"stage": stage, **{key: round(value, 3) for key, value in seconds.items()}}) + "\n")


def seconds_by_stage(folder: Path) -> dict[str, dict[str, float]]:
    """Return the sums over all calls, by stage, in the order of their first call."""
    totals: dict[str, dict[str, float]] = {}
    path = folder / _LOG
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        total = totals.setdefault(entry.pop("stage"), {"cpu_s": 0.0, "wall_s": 0.0})
        for key, value in entry.items():
            total[key] += value
    return totals
