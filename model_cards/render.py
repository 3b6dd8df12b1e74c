"""Write the cards of what was measured, from results/*.json, scripts/configs and experiments.yaml.

python model_cards/render.py            # rewrite the cards
python model_cards/render.py --check    # exit 1 if a card is not what the results say

An experiment is rendered once all its results files exist.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from hf_trak.hub.cards import show_number, show_result

HERE = Path(__file__).parent
ROOT = HERE.parent
TEMPLATES = HERE / "templates"
TAGS = ["trak", "data-attribution"]
_NO_RECIPE = (
    "train_file",
    "query_file",
    "hub_dataset",
    "hub_query_split",
    "text_columns",
)  # where data lies, and what it looks like


def load_experiments() -> dict[str, dict[str, Any]]:
    """Return the experiments whose results are all there."""
    experiments = yaml.safe_load((HERE / "experiments.yaml").read_text(encoding="utf-8"))
    return {name: one for name, one in experiments.items() if all(result_path(file).exists() for file in one["results"])}


def result_path(name: str) -> Path:
    return ROOT / "results" / f"{name}.json"


def choose(
    *, file: str, metric: str, method: str = "", case: str = "", value: str | None = None, unit: str = ""
) -> list[dict[str, Any]]:
    """Return the rows of a results file that have a metric, and whose method and case fit.

    Args:
        value (`str`, *optional*): A number that the rows have beside their own, in place of it, and its `unit`.

    Raises:
        ValueError: If none does: the results have changed under the card.
    """
    rows = json.loads(result_path(file).read_text())["rows"]
    mine = [
        row for row in rows if row["metric"] == metric and not row.get("published")
    ]  # others' figures are of other settings
    found = [row for row in mine if re.search(method, row["method"]) and re.search(case, row["case"])]
    if not found:
        raise ValueError(f"results/{file}.json has no row with metric {metric!r}, method {method!r} and case {case!r}.")
    if value is not None:
        found = [{**row, "metric": value, "value": row[value], "unit": unit, "interval": None} for row in found]
    return found


def eval_results(experiment: dict[str, Any], rows: list[dict[str, Any]], ceiling: dict[str, Any] | None) -> list[EvalResult]:
    """Return what the YAML says was measured; each value with its interval, and LDS with its ceiling."""
    task, dataset = experiment["task"], experiment["dataset"]
    return [
        EvalResult(
            task_type=task["type"],
            task_name=task["name"],
            dataset_type=dataset["type"],
            dataset_name=dataset["name"],
            dataset_split=dataset["split"],
            metric_type=row["metric"],
            metric_name=f"{row['metric']}, {method_of(row)}",
            metric_value=round(row["value"], 4),
            metric_args={
                "case": row["case"],
                **({"interval": [round(value, 4) for value in row["interval"]]} if row.get("interval") else {}),
                **({"ceiling": round(ceiling["value"], 4)} if ceiling and row["metric"] == "lds" else {}),
            },
        )
        for row in rows
    ]


def method_of(row: dict[str, Any]) -> str:
    """Return a row's method, with what else sets it apart from the others."""
    apart = [f"top {row['top_k']}"] if "top_k" in row else []
    return ", ".join([row["method"], *apart, *([f"by {row['level']}"] if "level" in row else [])])


def shown(row: dict[str, Any]) -> dict[str, str]:
    """Return a row as text."""
    return show_result({**row, "method": method_of(row)})


def settings_of(experiment: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the recipe that the setting's file names."""
    if "setting" not in experiment:
        return []
    values = yaml.safe_load((ROOT / "scripts" / "configs" / f"{experiment['setting']}.yaml").read_text())
    hidden = (*_NO_RECIPE, *(["model"] if "MODEL" in experiment["make_models"] else []))
    return [(key, str(value)) for key, value in values.items() if key not in hidden]


def describe_run(name: str) -> dict[str, str]:
    """Return what a results file says of how it was made."""
    result = json.loads(result_path(name).read_text())
    hardware = result["hardware"]
    return {
        "command": result["command"],
        "commit": result["commit"],
        "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()) if isinstance(hardware, dict) else hardware,
        "versions": ", ".join(f"{key} {value}" for key, value in result["versions"].items()),
    }


def render(experiment: dict[str, Any]) -> dict[str, str]:
    """Return the cards of an experiment, by the names of their files."""
    rows = [row for wanted in experiment["evaluations"] for row in choose(**wanted)]
    ceiling = choose(**experiment["ceiling"])[0] if "ceiling" in experiment else None
    shared = {
        **{key: experiment[key] for key in ("model", "base", "data", "limits", "runs", "licence")},
        "load": experiment.get("load"),
        "make_models": experiment["make_models"],
        "make_features": experiment.get("make_features"),
        "settings": settings_of(experiment),
        "rows": [shown(row) for row in rows],
        "costs": [shown(row) for wanted in experiment["costs"] for row in choose(**wanted)],
        "results": [describe_run(name) for name in experiment["results"]],
        "ceiling": ceiling
        and {"value": show_number(ceiling["value"]), "interval": " to ".join(map(show_number, ceiling["interval"]))},
    }
    model, features = experiment["model_title"], experiment["features_title"]
    sources = [experiment["dataset"]["type"]] if experiment["dataset"].get("hub") else None
    model_data = ModelCardData(
        library_name="transformers",
        tags=TAGS,
        language=experiment.get("language"),
        base_model=experiment.get("base_model"),
        datasets=sources,
        pipeline_tag=experiment["task"]["type"],
        metrics=sorted({row["metric"] for row in rows}),
        model_name=model,
        eval_results=eval_results(experiment, rows, ceiling),
        **licence_keys(experiment, "model"),
    )
    features_data = DatasetCardData(
        tags=TAGS,
        language=experiment.get("language"),
        pretty_name=features,
        source_datasets=sources,
        **({"base_model": experiment["base_model"]} if "base_model" in experiment else {}),
        **licence_keys(experiment, "data"),
    )
    return {
        "model.md": fill(ModelCard, "model", model_data, {**shared, "title": model, **licence_shown(experiment, "model")}),
        "features.md": fill(
            DatasetCard, "features", features_data, {**shared, "title": features, **licence_shown(experiment, "data")}
        ),
    }


def licence_keys(experiment: dict[str, Any], of: str) -> dict[str, str]:
    keys = {"license": f"{of}_license", "license_name": f"{of}_license_name"}
    return {key: experiment[name] for key, name in keys.items() if name in experiment}


def licence_shown(experiment: dict[str, Any], of: str) -> dict[str, str | None]:
    return {"licence_id": experiment[f"{of}_license"], "licence_name": experiment.get(f"{of}_license_name")}


def fill(kind: type[Any], template: str, data: Any, values: dict[str, Any]) -> str:
    """Return a card: a template, with the parts that both kinds share in their places."""
    text = (TEMPLATES / f"{template}.md").read_text(encoding="utf-8")
    for part in ("results", "end"):
        text = text.replace(f'{{% include "{part}" %}}', (TEMPLATES / f"{part}.md").read_text(encoding="utf-8").rstrip("\n"))
    card = str(kind.from_template(data, template_str=text, **values))
    return re.sub(r"\n{3,}", "\n\n", card) + "\n"


def cards() -> dict[Path, str]:
    """Return every card's text, by its place."""
    return {HERE / name / file: text for name, one in load_experiments().items() for file, text in render(one).items()}


def main() -> None:
    stale = {path: text for path, text in cards().items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    if "--check" in sys.argv and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        raise SystemExit(f"Not what the results say: {names}. Run python model_cards/render.py.")
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
