"""What the demo shows and writes down: three held-out rows, the most suspicious labels, and how many flips were found."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.cli.results import commit

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.cli.demo_arguments import DemoArguments
    from hf_trak.cli.demo_data import DemoData
    from hf_trak.index import AttributionIndex

TOP = 0.1
_N_SUSPECTS = 10


def show(
    args: DemoArguments, data: DemoData, hits: Dataset, suspicion: np.ndarray, notes: dict[int, str], output: Path
) -> None:
    """Print and save the attributions of three held-out rows, and the most suspicious labels."""
    from hf_trak.cli.examples import ExampleReader, Hit, read_attributions
    from hf_trak.cli.report import save_report, suspects_table, table

    rows = pick_queries(np.asarray(hits["query_output"][:]))
    columns: dict[str, Any] = {
        "text_columns": tuple(args.text_columns) if args.text_columns else None,
        "image_column": args.image_column,
        "label_column": args.label_column,
    }
    train = ExampleReader(data.train, notes=notes, **columns)
    attributions = read_attributions(hits, ExampleReader(data.queries, **columns), train, rows=rows)
    top = np.argsort(-suspicion, kind="stable")[:_N_SUSPECTS]
    suspects = [Hit(train[int(row)], float(suspicion[row])) for row in top]
    print(f"\n{table(attributions)}\n\n{suspects_table(suspects)}")
    intro = (
        f"{len(data.train):,} training rows of {data.name}. Training on a proponent raised the model's output for the query, "
        "training on an opponent lowered it. The output is log p/(1 - p) of the query's label: negative where the model is wrong."
    )
    save_report(attributions, output, title=f"hf-trak demo: {data.name}", intro=intro, suspects=suspects)


def pick_queries(outputs: np.ndarray) -> list[int]:
    """Return up to three queries: the one the model gets most wrong, one it is unsure of, and a typical one."""
    order = np.argsort(outputs, kind="stable")
    return list(dict.fromkeys(int(order[position * len(order) // 20]) for position in (0, 1, 10)))


def results_of(
    args: DemoArguments, data: DemoData, index: AttributionIndex, rankings: dict[str, np.ndarray], flipped: np.ndarray
) -> dict[str, Any]:
    """Return what each ranking found, as results files have it."""
    from hf_trak.evaluation import found_share

    info = index.members[0].info
    case = (
        f"{type(data.model).__name__}, {data.name}, {index.n_rows} rows, proj_dim {args.proj_dim}, "
        f"{len(index.members)} members ({args.members}), seed {args.seed}"
    )
    rows = [
        {
            "case": case,
            "method": method,
            "metric": "flipped_found_share",
            "value": found_share(ranking, flipped, TOP),
            "unit": f"share of flipped labels in the top {TOP:.0%} of training rows",
            "interval": None,
            "n_flipped": int(flipped.sum()),
            "chance": TOP,
        }
        for method, ranking in rankings.items()
        if flipped.any()
    ]
    return {
        "name": "demo",
        "command": _command(args),
        "commit": commit(),
        "versions": info["versions"],
        "hardware": info["hardware"],
        "rows": rows,
        "flipped_rows": [row for row, was_flipped in enumerate(flipped.tolist()) if was_flipped],
    }


def found_table(results: dict[str, Any]) -> str:
    """Return the counts as lines for the terminal; empty if nothing was flipped."""
    lines = [f"  by {row['method']:<28}{row['value']:>7.1%}" for row in results["rows"]]
    heading = f"\nFlipped labels found in the {TOP:.0%} of training rows ranked highest (chance: {TOP:.0%})"
    return "\n".join([heading, *lines, ""]) if lines else ""


def _command(args: DemoArguments) -> str:
    given = {f.name: getattr(args, f.name) for f in fields(args) if getattr(args, f.name) != f.default}
    flags = [f"--{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in given.items()]
    return " ".join(["hf-trak demo", *flags])
