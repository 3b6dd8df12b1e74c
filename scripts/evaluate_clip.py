"""How good attributions of a dual encoder are: counterfactuals and LDS on images with captions.

python scripts/evaluate_clip.py --scale small --vision dinov2-small --text all-MiniLM-L6-v2 --output out   # two cores, under two hours
python scripts/evaluate_clip.py --data COCO --model CLIP --output out                                      # as published, on a GPU
python scripts/evaluate_clip.py ... --shard_index 3 --num_shards 100                                       # one task of an array of jobs

With --model, everything in a dual encoder is trained. With --vision and --text, both towers are pretrained and frozen, and trained, and so
what gradients are of, are two projections and the temperature; one training run then takes a second.

Counterfactuals: the top k training pairs by each method are removed for each of some held-out pairs, and the change of the cosine
between its image and its caption is reported. LDS: outputs of models trained on random halves against the sums of scores. The same
command again goes on where it was stopped. `--scale SCALE` is short for `--config scripts/configs/clip_SCALE.yaml`.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from clip_evaluation import run_contrastive
from clip_training import ContrastiveArguments

from hf_trak.cli.main import quiet_libraries
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.cli.results import commit, write_results
from hf_trak.plots import save_plots

CONFIGS = Path(__file__).parent / "configs"
SCALES = ("small", "paper")


@dataclass
class ReportArguments:
    """Where results go."""

    result: str | None = field(default=None, metadata={"help": "JSON file of results; by default results.json in --output."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 leaves them as they are."})


def main(args: ContrastiveArguments, report: ReportArguments) -> None:
    """Score, retrain, report."""
    quiet_libraries()
    if report.threads:
        torch.set_num_threads(report.threads)
    rows = run_contrastive(args)
    if rows is None:
        print("This part is done. Run it again once the others are: the one that finishes last writes the results.")
        return
    path = Path(report.result or Path(args.output) / "results.json")
    write_results(results_of(rows, args, path), path)
    for row in rows:
        k = "" if "top_k" not in row else f" top {row['top_k']}"
        print(f"{row['method']:<60}{row['metric']}{k}: {row['value']:+.3f}  {row['interval']}")
    print(*save_plots([path], Path(args.output) / "plots", title=path.stem), sep="\n")


def results_of(rows: list[dict[str, Any]], args: ContrastiveArguments, path: Path) -> dict[str, Any]:
    """Return the rows in the form of every results file."""
    scale = "small --vision VISION --text TEXT" if args.model is None else f"paper --data DATA --model {Path(args.model).name}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    return {
        "name": path.stem,
        "command": f"python scripts/evaluate_clip.py --scale {scale} --output out",
        "commit": commit(),
        "versions": versions,
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads()},
        "rows": rows,
    }


def parse_arguments(arguments: list[str]) -> tuple[ContrastiveArguments, ReportArguments]:
    """Return the arguments; without a scale they are the paper's."""
    scale = "paper"
    if "--scale" in arguments:
        place = arguments.index("--scale")
        scale = next(iter(arguments[place + 1 :]), "")
        arguments = [*arguments[:place], *arguments[place + 2 :]]
    if scale not in SCALES:
        raise SystemExit(f"--scale must be one of {', '.join(SCALES)}, but is {scale!r}.")
    usage = "[--scale small] --output FOLDER [options]"
    parser = make_parser(
        [ContrastiveArguments, ReportArguments], command="evaluate_clip", usage=usage, description=__doc__ or ""
    )
    config = [] if {"--config"} & set(arguments) else ["--config", str(CONFIGS / f"clip_{scale}.yaml")]
    args, report = parse(parser, [*config, *arguments])
    return args, report


if __name__ == "__main__":
    main(*parse_arguments(sys.argv[1:]))
