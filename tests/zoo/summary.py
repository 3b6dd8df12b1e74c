"""The summary of a sweep, in the schema of `results/`."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers

from tests.zoo.cases import OUTCOMES

ENGINES = ("layerwise", "loop")


def summarize(records: Sequence[dict[str, Any]], *, n_cases: int) -> dict[str, Any]:
    """Return shares by task and outcome, and what became of every model.

    Args:
        n_cases (`int`): How many cases there are, run or not.
    """
    built = [record for record in records if record["outcome"] != "not built"]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for record in built:
        by_task.setdefault(record["task"], []).append(record)
    rows = [row for task, found in by_task.items() for row in _rows(task, found)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "name": "zoo",
        "command": "python -m tests.zoo --output results/zoo.json",
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": 1},
        "n_cases": n_cases,
        "n_run": len(records),
        "n_built": len(built),
        "rows": [*rows, *_rows("all tasks", built)],
        "models": [_model(record) for record in records],
    }


def _rows(case: str, records: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield the share of each outcome, of what is right by engine."""
    counts = Counter((record["outcome"], record.get("engine") if record["outcome"] == "right" else None) for record in records)
    for outcome in OUTCOMES:
        for engine in ENGINES if outcome == "right" else (None,):
            count = counts[outcome, engine]
            yield {
                "case": case,
                "method": "auto",
                "metric": "served_share",
                "value": round(count / max(1, len(records)), 4),
                "unit": "share",
                "interval": None,
                "outcome": outcome,
                "engine": engine,
                "count": count,
                "n_built": len(records),
            }


def _model(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("task", "model_type", "class_name", "outcome", "engine", "reason", "message")
    short = {name: record[name] for name in kept if record.get(name)}
    if "error" in record and record["outcome"] in ("right", "silently wrong"):
        short["error"] = float(f"{max(record['error'], record['error_in_another_batch']):.2g}")
    for name in ("reason", "message"):
        if name in short:
            short[name] = short[name][:160]
    return short
