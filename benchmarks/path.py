"""LDS of one training run by where gradients are taken: its end, its epochs, and points of the line from its base; and how they are combined.

    python scripts/train_subsets.py --setting sst2 --scale small --model bert-mini --output W/text --jobs full --n_full 1
    python benchmarks/path.py --setting sst2 --model bert-mini --job W/text/full --ground_truth results/ground_truth_text.parquet \\
        --output results/path_text.json

With `--halves`, runs on random halves (job `members`) are measured, too, at their ends and on the lines to them.

The base is what a user has: the public model without a head, or the network before its head was replaced. Indexes are built by
`AttributionIndex.build` and kept beside the job; nothing is tuned. Intervals are of a bootstrap over subsets.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from featurize import write
from lds_setting import Job, Judge, as_row, parquet

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.evaluation import ground_truth_from
from hf_trak.members import DEFAULT_ALPHAS

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIGS = SCRIPTS / "configs"
WITHOUT_TABLES = (r"^(?!.*(word|position|token_type)_embeddings)",)


def parser_of_a_run(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that name a run, for all benchmarks of points of its path."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=["sst2", "qnli", "cifar2", "sst2lm"], required=True)
    parser.add_argument(
        "--model", help="the public model that was fine-tuned; of cifar2, the folder `pretrained` beside the job"
    )
    parser.add_argument("--job", type=Path, required=True, help="folder of the job `full` of scripts/train_subsets.py")
    parser.add_argument("--ground_truth", type=Path, required=True, help="Parquet file of masks and outputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser


def base_of(options: argparse.Namespace) -> Path:
    """Write the weights that training began with, without a head, and return their folder."""
    folder = options.job.parent / "base"
    if not folder.exists():
        values = yaml.safe_load((CONFIGS / f"{options.setting}_small.yaml").read_text())
        values["model"] = options.model or str(options.job.parent / "pretrained")
        sys.path.append(str(SCRIPTS))
        from paper_settings import Setting, prepare

        setting = Setting(**{key: value for key, value in values.items() if key in {field.name for field in fields(Setting)}})
        if setting.text_columns and setting.num_labels:
            model = prepare(setting, data_folder=Path("../shared/data")).make_model()
            model.base_model.save_pretrained(folder)
        else:
            return Path(setting.model)
    return folder


class Run(NamedTuple):
    """One training run, its rows, and the judge of scores.

    Args:
        epochs (`list[str]`): The checkpoints of the run.
    """

    train: Dataset
    queries: Dataset
    judge: Judge
    epochs: list[str]
    base: Path

    @classmethod
    def load(cls, options: argparse.Namespace) -> Run:
        data = options.job.parent / "data"
        train, queries = parquet(data / "train.parquet"), parquet(data / "queries.parquet")
        judge = Judge(ground_truth_from(Dataset.from_parquet(str(options.ground_truth))))
        return cls(train, queries, judge, Job(options.job).runs[0], base_of(options))


def main() -> None:
    parser = parser_of_a_run(__doc__)
    parser.add_argument("--halves", type=Path, help="folder of the job `members`: runs on random halves, to be measured too")
    parser.add_argument("--proj_dim", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, queries, judge, epochs, base = Run.load(options)
    final = epochs[-1]
    alphas = ", ".join(f"{alpha:g}" for alpha in DEFAULT_ALPHAS)
    points = f"points of the line, α = {alphas} (the default with a base)"
    indexes: dict[str, dict[str, Any]] = {
        "final weights": {"models": final},
        "last three epochs": {"models": epochs[-3:]},
        "one point of the line, α = 0.5": {"models": final, "base": base, "alpha": 0.5},
        points: {"models": final, "base": base},
    }
    if options.setting in ("sst2", "qnli"):  # the others have no tables of these names
        indexes[f"{points}, without embedding tables"] = {"models": final, "base": base, "parameters": WITHOUT_TABLES}
        indexes["last three epochs, without embedding tables"] = {"models": epochs[-3:], "parameters": WITHOUT_TABLES}
    if options.halves:
        halves = Job(options.halves).last
        for count in sorted({min(5, len(halves)), len(halves)}):
            indexes[f"{count} runs on halves, final weights"] = {"models": halves[:count]}
            indexes[f"{count} runs on halves, points of the line, α = {alphas}"] = {"models": halves[:count], "base": base}
    case = f"{options.setting}, one run of {len(epochs)} epochs, {len(train):,} rows, {len(queries)} queries, proj_dim {options.proj_dim}"
    rows: list[dict[str, Any]] = []
    reference = None
    for number, (name, arguments) in enumerate(indexes.items()):
        parameters = arguments.pop("parameters", None)
        index = AttributionIndex.build(
            options.job.parent / f"path_{number}",
            dataset=train,
            config=TrakConfig(proj_dim=options.proj_dim, label_mapping="by_id", parameters=parameters),
            progress=False,
            **arguments,
        )
        ways: dict[str, dict[str, Any]] = {name: {}}
        if len(index.members) > 1 and parameters is None and "halves" not in name:
            ways[f"{name}, combined as in the paper"] = {"combination": "means"}
        for method, options_of_scores in ways.items():
            values = judge([index.score(queries, progress=False, **options_of_scores)])
            rows.append(as_row(case, method, values))
            reference = values if reference is None else reference
            if reference is not values:
                rows.append(as_row(case, f"{method}, over the final weights", values / reference, metric="lds_ratio"))
            print(json.dumps(rows[-1]), f"{values[0]:.3f}", flush=True)
            write(options, rows, command=f"python benchmarks/path.py --setting {options.setting}")
    assert np.isfinite([row["value"] for row in rows]).all()


if __name__ == "__main__":
    main()
