"""Remove the training examples that each method credits most for a prediction, train again, and see how far the output falls.

python scripts/evaluate_counterfactual.py --setting cifar2 --scale small --scores hf_trak=trak.npy gradient_cosine=cosine.npy \\
    --output out/removals --result results/counterfactual_image.json

Scores are (n_train, n_query) arrays over the setting's training rows and queries, as `AttributionIndex.score` or any baseline returns
them. Stopped at any moment, the same command goes on; any number of processes, each with a shard of its own, may share the folder.
The targets are drawn from the queries that come first in a permutation of them, whatever any model says of them.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_settings import Prepared, Setting, prepare, pretrain
from train_subsets import add_setting_shortcut

from hf_trak.cli.main import quiet_libraries
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.cli.results import commit, write_results
from hf_trak.evaluation import Recipe
from hf_trak.evaluation.counterfactual import (
    Counterfactuals,
    Retrain,
    bootstrap_interval,
    outputs_of_targets,
    run_counterfactuals,
    summarize_counterfactuals,
)
from hf_trak.evaluation.training import outputs_on, train
from hf_trak.hashing import stream_key


@dataclass
class RemovalArguments:
    """What is removed, for whom, and where results go."""

    scores: list[str] = field(metadata={"help": "METHOD=FILE.npy, one or more."})
    output: str = field(metadata={"help": "Folder for the runs."})
    result: str | None = field(default=None, metadata={"help": "JSON file for the summary, once all runs are there."})
    data: str = field(default="../shared/data", metadata={"help": "Folder of Parquet files; what it lacks comes from the Hub."})
    pretrained: str | None = field(
        default=None, metadata={"help": "Folder that scripts/train_subsets.py pretrained in; by default one in --output."}
    )
    case: str = field(default="", metadata={"help": "What the results say of model and data."})
    n_targets: int = field(default=16, metadata={"help": "Queries, drawn at random."})
    top_k: list[int] = field(default_factory=lambda: [25, 100, 300], metadata={"help": "How many examples are removed."})
    n_seeds: int = field(default=2, metadata={"help": "Training runs per removal."})
    shard_index: int = field(default=0, metadata={"help": "Which part of the runs to do."})
    num_shards: int = field(default=1, metadata={"help": "Number of parts."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves them as they are."})


def main(args: RemovalArguments, setting: Setting, recipe: Recipe) -> None:
    """Do the runs of this shard; sum up where none is missing."""
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {"data_folder": Path(args.data), "device": "cuda" if torch.cuda.is_available() else "cpu"}
    if setting.pretrain_classes:
        folder = Path(args.pretrained) if args.pretrained else Path(args.output) / "pretrained"
        setting = pretrain(setting, recipe, folder, **options)
    prepared = prepare(setting, **options)
    plan = Counterfactuals(
        scores=load_scores(args.scores),
        targets=sorted(np.random.default_rng(0).permutation(len(prepared.query_rows))[: args.n_targets].tolist()),
        top_k=args.top_k,
        seeds=range(args.n_seeds),
        case=args.case,
    )
    runs = Path(args.output) / "runs"
    run_counterfactuals(
        plan, retrain_with(prepared, recipe, options["device"]), runs, shard=(args.shard_index, args.num_shards)
    )
    if args.num_shards == 1 or args.result:
        report([*summarize_counterfactuals(plan, runs), *differences(plan, runs)], args)


def differences(plan: Counterfactuals, runs: Path) -> list[dict[str, Any]]:
    """Return result rows of the change that the first method's removals make, less that of each other's, paired over targets."""
    _, removed = outputs_of_targets(plan, runs)
    first, rows = next(iter(plan.scores)), []
    for (method, k), outputs in removed.items():
        if method != first:
            ahead = removed[first, k] - outputs
            interval = bootstrap_interval(ahead)
            rows.append(
                {
                    "case": plan.case,
                    "method": f"{first}, less {method}",
                    "metric": "counterfactual_delta_ahead",
                    "value": float(ahead.mean()),
                    "unit": "output",
                    "interval": None if interval is None else list(interval),
                    "top_k": k,
                    "n_targets": len(plan.targets),
                    "n_seeds": len(plan.seeds),
                }
            )
    return rows


def load_scores(entries: list[str]) -> dict[str, np.ndarray]:
    """Return scores by method."""
    scores = {}
    for entry in entries:
        method, _, path = entry.partition("=")
        if not path:
            raise ValueError(f"`scores` takes METHOD=FILE.npy, but got {entry!r}.")
        scores[method] = np.load(path, allow_pickle=False)
    return scores


def retrain_with(prepared: Prepared, recipe: Recipe, device: str) -> Retrain:
    """Return what trains a fresh model on some rows and gives its outputs on the queries."""

    def retrain(mask: np.ndarray, seed: int) -> np.ndarray:
        with torch.random.fork_rng():
            key = stream_key("counterfactual run", seed) % 2**63
            torch.manual_seed(key)
            model = prepared.make_model().to(device)
            train(model, prepared.train_rows, np.flatnonzero(mask).tolist(), recipe, seed=key)
            return outputs_on(model, prepared.query_rows, prepared.task)

    return retrain


def report(rows: list[dict[str, object]], args: RemovalArguments) -> None:
    """Print the summary, and write it."""
    for row in rows:
        print(f"{row['method']:<40} k {row['top_k']:>5}  {row['metric']:<30} {row['value']:+.3f}  {row['interval']}")
    if args.result:
        result = {
            "name": Path(args.result).stem,
            "command": f"python scripts/evaluate_counterfactual.py --result results/{Path(args.result).name}",
            "commit": commit(),
            "versions": {"torch": torch.__version__},
            "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
            "rows": rows,
        }
        write_results(result, Path(args.result))


def parse_arguments(arguments: list[str]) -> tuple[RemovalArguments, Setting, Recipe]:
    """Return the arguments; `--setting NAME --scale SCALE` is short for `--config scripts/configs/NAME_SCALE.yaml`."""
    parser = make_parser(
        [RemovalArguments, Setting, Recipe],
        command="evaluate_counterfactual",
        usage="--setting SETTING [--scale small] --scores METHOD=FILE.npy ... --output FOLDER [options]",
        description=__doc__ or "",
    )
    return parse(parser, add_setting_shortcut(arguments))


if __name__ == "__main__":
    main(*parse_arguments(sys.argv[1:]))
