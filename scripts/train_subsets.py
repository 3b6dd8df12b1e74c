"""Train models on random subsets of a training set, for the linear datamodeling score.

python scripts/train_subsets.py --setting sst2 --scale small --model bert-mini --output out      # two cores
accelerate launch scripts/train_subsets.py --setting cifar2 --output out                         # as published, on every GPU
python scripts/train_subsets.py --setting cifar2 --output out --shard_index 3 --num_shards 100   # one task of an array of jobs

The same command again goes on where it was stopped; any number of processes may share an output folder. Three jobs in this order:
`full`, models of the whole training set; `members`, models of subsets for ensembles, both with their weights; and `ground_truth`,
the outputs that scores are compared with. When all runs are done, each job is collected as a Dataset.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from paper_settings import Prepared, Setting, prepare, pretrain

from hf_trak.cli.main import quiet_libraries
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.evaluation import Recipe, SubsetJob, collect, ground_truth_reliability, make_masks

CONFIGS = Path(__file__).parent / "configs"
SETTINGS = ("cifar2", "cifar10", "imagenet", "qnli", "sst2", "sst2lm")


@dataclass
class JobArguments:
    """What is run, and where it goes."""

    output: str = field(metadata={"help": "Folder for the jobs."})
    data: str = field(default="../shared/data", metadata={"help": "Folder of Parquet files; what it lacks comes from the Hub."})
    jobs: list[str] = field(default_factory=lambda: ["full", "members", "ground_truth"], metadata={"help": "Which jobs."})
    alpha: float = field(default=0.5, metadata={"help": "Share of the training set in a subset."})
    n_subsets: int = field(default=64, metadata={"help": "Subsets of the ground truth."})
    n_seeds: int = field(default=2, metadata={"help": "Runs per subset of the ground truth."})
    n_members: int = field(default=20, metadata={"help": "Subsets of the members, other than the ground truth's."})
    n_full: int = field(default=5, metadata={"help": "Runs on the whole training set."})
    keep_epochs: int = field(
        default=5, metadata={"help": "Keep the weights of so many last epochs, if there are, of the runs on the whole set."}
    )
    shard_index: int = field(default=0, metadata={"help": "Which part of the runs to do."})
    num_shards: int = field(default=1, metadata={"help": "Number of parts; each process of accelerate takes a part of a part."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push the ground truth to this dataset of the Hub."})
    overwrite: bool = field(default=False, metadata={"help": "Replace other jobs in the output folder."})


def main(args: JobArguments, setting: Setting, recipe: Recipe) -> None:
    """Run the jobs; the process that finishes last collects them."""
    quiet_libraries()
    # Processes wait for each other at the end only, and for as long as a run takes.
    state = PartialState(cpu=use_cpu(), timeout=timedelta(days=30))
    check_processes(state)
    options = {"data_folder": Path(args.data), "device": str(state.device)}
    if setting.pretrain_classes:
        with state.main_process_first():
            setting = pretrain(setting, recipe, Path(args.output) / "pretrained", **options)
    prepared = prepare(setting, **options)
    jobs = make_jobs(args, recipe, prepared, state)  # refuses a folder of something else before anything is written
    if not setting.on_demand:
        with state.main_process_first():
            prepared.save_data(Path(args.output) / "data", overwrite=args.overwrite)
    for job in jobs.values():
        job.work(
            prepared.make_model,
            prepared.train_rows,
            prepared.query_rows,
            prepared.task,
            shard=args.shard_index * state.num_processes + state.process_index,
            n_shards=args.num_shards * state.num_processes,
            device=str(state.device),
            processing_class=prepared.processing_class,
        )
    state.wait_for_everyone()
    if state.is_main_process:
        report({name: job for name, job in jobs.items() if not job.missing()}, args)


def use_cpu() -> bool:
    """Return whether to stay on the CPU: told to by accelerate's variable, or for want of anything else."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def check_processes(state: PartialState) -> None:
    """Stop if the launcher started processes that know nothing of each other: each would do all of the work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise SystemExit(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}. Launch with "
            "accelerate launch --multi_gpu --num_processes N, on a machine without a GPU too."
        )


def make_jobs(args: JobArguments, recipe: Recipe, prepared: Prepared, state: PartialState) -> dict[str, SubsetJob]:
    """Return the jobs that were asked for, in the order of their arguments."""
    n_train = len(prepared.train_rows)
    shapes = {
        "full": (make_masks(n_train, 1, 1.0), args.n_full, min(args.keep_epochs, recipe.epochs)),
        "members": (make_masks(n_train, args.n_members, args.alpha, seed=1), 1, 1),
        "ground_truth": (make_masks(n_train, args.n_subsets, args.alpha, seed=0), args.n_seeds, 0),
    }
    jobs = {}
    with state.main_process_first():
        for name in args.jobs:
            masks, n_seeds, keep_epochs = shapes[name]
            jobs[name] = SubsetJob(
                Path(args.output) / name,
                masks=masks,
                n_seeds=n_seeds,
                recipe=recipe,
                identity=prepared.identity(),
                keep_epochs=keep_epochs,
                overwrite=args.overwrite,
            )
    return jobs


def report(jobs: dict[str, SubsetJob], args: JobArguments) -> None:
    """Collect the jobs that are done, and say how reliable the ground truth is."""
    for name, job in jobs.items():
        print(f"{name}: {len(job.runs)} runs in {job.save()}")
    if "ground_truth" in jobs:
        if args.n_seeds > 1:
            print(ground_truth_reliability(jobs["ground_truth"].outputs()))
        if args.push_to_hub:
            collect(jobs["ground_truth"]).push_to_hub(args.push_to_hub, "ground_truth")


def parse_arguments(arguments: list[str]) -> tuple[JobArguments, Setting, Recipe]:
    """Return the arguments; `--setting NAME --scale SCALE` is short for `--config scripts/configs/NAME_SCALE.yaml`."""
    parser = make_parser(
        [JobArguments, Setting, Recipe],
        command="train_subsets",
        usage="--setting SETTING [--scale small] --output FOLDER [options]",
        description=__doc__ or "",
    )
    return parse(parser, add_setting_shortcut(arguments))


def add_setting_shortcut(arguments: list[str]) -> list[str]:
    """Return the arguments with `--setting` and `--scale` replaced by the `--config` they stand for."""
    shortcut = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shortcut.add_argument("--setting", choices=SETTINGS)
    shortcut.add_argument("--scale", choices=["paper", "small"], default="paper")
    chosen, rest = shortcut.parse_known_args(arguments)
    if chosen.setting is not None:
        return ["--config", str(CONFIGS / f"{chosen.setting}_{chosen.scale}.yaml"), *rest]
    return rest


if __name__ == "__main__":
    main(*parse_arguments(sys.argv[1:]))
