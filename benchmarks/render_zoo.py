"""Tables of results/zoo.json: `<!-- zoo: tasks -->`, `<!-- zoo: models -->` and `<!-- zoo: others -->` in README.md and docs/."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FEW = 5  # models: tasks with fewer share a line
BLOCK = re.compile(r"(<!-- zoo: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """Return a text with its tables of the zoo made anew."""
    if not BLOCK.search(text):
        return text
    result = json.loads((ROOT / "results" / "zoo.json").read_text())
    tables = {"tasks": by_task, "models": by_model, "others": others}
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match[2]](result)}\n\n{origin(result)}\n{match[3]}", text)


def by_task(result: dict[str, Any]) -> str:
    """Return one line per task: how many models are right, by which engine, and what becomes of the others."""
    columns = [
        ("right", "layerwise"),
        ("right", "loop"),
        ("refused", None),
        ("no task", None),
        ("crash", None),
        ("silently wrong", None),
    ]
    cases: dict[str, Counter[tuple[str, str | None]]] = {}
    built: dict[str, int] = {}
    for row in result["rows"]:
        case = row["case"] if row["n_built"] >= _FEW else "other tasks"
        counts = cases.setdefault(case, Counter())
        counts[row["outcome"], row["engine"]] += row["count"]
        built[case] = built.get(case, 0) + row["count"]
    lines = [
        "| task | models | right | by `layerwise` | by `loop` | refused | no task | crash | silently wrong |",
        "|" + "---|" * 9,
    ]
    for case, counts in sorted(
        cases.items(), key=lambda item: ("other tasks", "all tasks").index(item[0]) + 1 if " tasks" in item[0] else 0
    ):
        right = counts["right", "layerwise"] + counts["right", "loop"]
        share = f"{right} ({right / max(1, built[case]):.1%})"
        lines.append(f"| {' | '.join(map(str, [case, built[case], share, *(counts[column] for column in columns)]))} |")
    return "\n".join(lines)


def by_model(result: dict[str, Any]) -> str:
    """Return one line per model type: the tasks it is right for, by engine."""
    types: dict[str, dict[str, list[str]]] = {}
    for model in result["models"]:
        if model["outcome"] == "right":
            tasks = types.setdefault(model["model_type"], {}).setdefault(model["engine"], [])
            if model["task"] not in tasks:
                tasks.append(model["task"])
    lines = ["| model type | right by `layerwise` | right by `loop` |", "|---|---|---|"]
    for name, engines in sorted(types.items()):
        lines.append(f"| `{name}` | {', '.join(engines.get('layerwise', []))} | {', '.join(engines.get('loop', []))} |")
    return "\n".join(lines)


def others(result: dict[str, Any]) -> str:
    """Return one line per case that is not right, or whose tiny model could not be built, and why."""
    lines = ["| class | task | outcome | message |", "|---|---|---|---|"]
    order = Counter({"silently wrong": 5, "crash": 4, "refused": 3, "no task": 2, "not built": 1})
    cases = [model for model in result["models"] if model["outcome"] != "right"]
    for model in sorted(cases, key=lambda model: (-order[model["outcome"]], model["task"], model["class_name"])):
        message = model.get("message", "").replace("|", "\\|")
        lines.append(f"| `{model['class_name']}` | {model['task']} | {model['outcome']} | {message} |")
    return "\n".join(lines)


def origin(result: dict[str, Any]) -> str:
    """Say how many cases there are, how many ran, and how they were made."""
    versions = result["versions"]
    return (
        f"{result['n_run']} of {result['n_cases']} cases run, {result['n_built']} of them on a tiny model that could be built: "
        f"`{result['command']}`, transformers {versions['transformers']}, torch {versions['torch']}."
    )
