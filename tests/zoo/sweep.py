"""Run cases, each in a forked process with a time limit, and write one JSON line per case as it ends."""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.zoo.cases import Case, run_case

_WAITING = 10  # times its limit of CPU time is what a case may take on a busy machine
_IMPORTED = ("torch", "transformers", "numpy", "PIL", "tokenizers", "hf_trak", "sympy", "scipy", "mpmath")


def run_all(cases: Iterable[Case], lines: Path, *, limit: int, again: Iterable[str] = ()) -> None:
    """Run the cases that a file of lines does not hold yet, and append a line for each.

    Args:
        limit (`int`): Seconds of CPU time that a case may take; after them it counts as a crash.
        again (`Iterable[str]`): Outcomes whose cases run once more.
    """
    done = {Case(*key) for key, record in read_lines(lines).items() if record["outcome"] not in set(again)}
    todo = [case for case in cases if case not in done]
    if todo:
        _import_ahead()
    for case in todo:
        record = in_child(lambda case=case: run_case(case), {**case._asdict()}, limit=limit)
        with lines.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(*case, record["outcome"], record.get("engine") or record.get("message", ""), flush=True)


def read_lines(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the last record of each case."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(record["task"], record["model_type"], record["class_name"]): record for record in records}


def in_child(run: Callable[[], dict[str, Any]], known: dict[str, Any], *, limit: int) -> dict[str, Any]:
    """Return what `run` returns in a forked process, or a record of how the process ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        _silence()
        try:
            with os.fdopen(write, "w") as file:
                file.write(json.dumps(run()))
        finally:
            os._exit(0)
    os.close(write)
    start, data, ended = time.monotonic(), b"", False
    while not ended and (left := start + _WAITING * limit - time.monotonic()) > 0:
        if select.select([read], [], [], left)[0]:
            chunk = os.read(read, 1 << 16)
            data, ended = data + chunk, not chunk
    if not ended:
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    try:
        return json.loads(data)
    except ValueError:
        took_too_long = not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
        how = f"did not end within {limit} s" if took_too_long else f"ended with signal or status {status}"
        return {**known, "outcome": "crash", "message": f"The process {how}."}


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def _import_ahead() -> None:
    """Import once what every child would import; a child finds it out, since a parent that computed gradients cannot be forked."""
    first = [
        Case("text-classification", "bert", "BertForSequenceClassification"),
        Case("image-classification", "vit", "ViTForImageClassification"),
    ]

    def run() -> dict[str, Any]:
        for case in first:
            run_case(case)
        return {"modules": list(sys.modules)}

    for name in in_child(run, {"modules": []}, limit=300)["modules"]:
        if name.split(".")[0] in _IMPORTED and name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:
                continue  # a module that only its own package can import; a child imports what it needs
