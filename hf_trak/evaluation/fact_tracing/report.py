"""The results of an evaluation as rows: every method at both levels, what was forgotten, what it took, and the published figures."""

from __future__ import annotations

import subprocess
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from hf_trak.evaluation.fact_tracing.counterfactual import Forgetting, summarize_forgetting
from hf_trak.evaluation.fact_tracing.measuring import LEVELS, result_rows
from hf_trak.evaluation.fact_tracing.published import published_rows
from hf_trak.evaluation.fact_tracing.rankings import Rankings
from hf_trak.evaluation.fact_tracing.stages import seconds_by_stage
from hf_trak.evaluation.fact_tracing.workspace import NOT_SHARED, Workspace
from hf_trak.featurizing.descriptions import hardware_name, library_versions
from hf_trak.storage.files import read_json, write_json

_COMPARED = ("mrr", "recall_at_10")


def write_report(space: Workspace, rankings: Rankings, plan: Forgetting) -> dict[str, Any]:
    """Return all results, and write them to the workspace, and to where its arguments say."""
    rows = [*_ranking_rows(rankings), *_variant_rows(rankings)]
    rows += summarize_forgetting(plan, space.folder / "forgetting")
    rows += _facts_rows(space) + _stage_rows(space) + published_rows()
    result = {
        "name": "results",
        "command": command_of(space),
        "commit": _commit(),
        "versions": library_versions(),
        "hardware": hardware_name(torch.device(space.device)),
        "rows": rows,
    }
    write_json(space.folder / "results.json", result)
    if space.args.results is not None:
        write_json(Path(space.args.results), {**result, "name": Path(space.args.results).stem})
    return result


def _ranking_rows(rankings: Rankings) -> list[dict[str, Any]]:
    """Each method, every query ranked by the variant that the other half of the queries chose, and what TRAK is ahead by."""
    rows = []
    for level in LEVELS:
        measured = {method: rankings.measures(chosen.scores, level) for method, chosen in rankings.chosen.items()}
        for method, measures in measured.items():
            more = {"variant": rankings.chosen[method].variant, "level": level}
            rows += result_rows(measures, case=rankings.workspace.case, method=method, **more)
        for method in [name for name in measured if name != "TRAK"]:
            ahead = {f"{metric}_ahead": measured["TRAK"][metric] - measured[method][metric] for metric in _COMPARED}
            rows += result_rows(ahead, case=rankings.workspace.case, method=f"TRAK over {method}", level=level)
    return rows


def _variant_rows(rankings: Rankings) -> list[dict[str, Any]]:
    """MRR of every variant, so that a reader sees what the choice was among."""
    return [
        {**row, "metric": "variant_mrr"}
        for method, variants in rankings.variant_measures.items()
        for variant, measures in variants.items()
        if len(variants) > 1
        for row in result_rows(
            {"mrr": measures["mrr_expected"]},
            case=rankings.workspace.case,
            method=method,
            variant=variant,
            level="sentence",
        )
    ]


def _facts_rows(space: Workspace) -> list[dict[str, Any]]:
    learned = read_json(space.folder / "learned.json")
    shares = [
        _plain_row(space.case, "fine-tuning", name, value, "share") for name, value in learned.items() if name != "learned"
    ]
    asked = _plain_row(space.case, "fine-tuning", "facts_asked", len(space.queries), "facts")
    return [asked, _plain_row(space.case, "fine-tuning", "facts_learned", len(learned["learned"]), "facts"), *shares]


def _stage_rows(space: Workspace) -> list[dict[str, Any]]:
    return [
        _plain_row(space.case, stage, f"stage_{metric}", value, "s")
        for stage, seconds in seconds_by_stage(space.folder).items()
        for metric, value in seconds.items()
    ]


def _plain_row(case: str, method: str, metric: str, value: float, unit: str) -> dict[str, Any]:
    return {"case": case, "method": method, "metric": metric, "value": value, "unit": unit, "interval": None}


def command_of(space: Workspace) -> str:
    """Return the command that does this, with the flags that are not the defaults."""
    given = []
    for options in (space.args, space.recipe):
        for option in fields(options):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            value = getattr(options, option.name)
            if option.name not in NOT_SHARED and value != default:
                given.append(f"--{option.name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(["hf-trak evaluate ftrace", *given])


def _commit() -> str | None:
    """Return the commit this package runs from, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
