"""`hf-trak featurize`: a training set to an index."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.cli.parsing import Collect, make_parser, parse, rows_at_a_time
from hf_trak.feature_args import FeatureArguments
from hf_trak.messages import mask_secrets, say
from hf_trak.runtime import uncollected

if TYPE_CHECKING:
    from hf_trak.index import AttributionIndex

_USAGE = "--model MODEL --dataset DATASET --output FOLDER [options]"
_DESCRIPTION = """\
Make an index: the features of a training set under one or more checkpoints of a model. It costs about one more epoch of
training. Stopped at any moment, the same command goes on where it stopped. Under `accelerate launch`, processes share the work.

examples:
  hf-trak featurize --model my-bert --dataset train.parquet --output my-index
  hf-trak featurize --model my-bert --dataset train.parquet --output my-index --keep_columns text,label
  hf-trak featurize --model my-bert --base google-bert/bert-base-uncased --dataset train.parquet --output my-index   (docs/concepts/halfway.md)
  hf-trak featurize --model run/members/epoch-0002 run/members/epoch-0003 --dataset stanfordnlp/sst2 --output my-index
  accelerate launch --multi_gpu scripts/featurize.py --model my-bert --dataset train.parquet --output my-index
  hf-trak featurize --model my-bert --dataset train.parquet --output my-index --task my_tasks:weighted   (docs/guides/custom_tasks.md)
  hf-trak featurize ... --shard-index 0 --num-shards 8      (the first of eight jobs; then: hf-trak merge my-index)
"""


@dataclass
class FeaturizeArguments:
    """What to featurize, and where the index goes."""

    model: list[str] = field(
        metadata={"help": "Folder or repository of a checkpoint; several make an ensemble.", "action": Collect}
    )
    dataset: str = field(metadata={"help": "The training set: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub."})
    output: str = field(metadata={"help": "Folder for the index, or the URL of an object store, such as s3://bucket/my-index."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the repositories in --model."})
    processor: str | None = field(
        default=None,
        metadata={
            "help": "Folder or repository of the tokenizer, image processor or both, for checkpoints that have none; by default the "
            "checkpoint's own."
        },
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "preference, of a language or reward model trained on chosen and rejected answers; or a task of your own, module:name: a Task, or a "
            "function (model, config) -> Task, which can be imported here. By default, the task follows from the model."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset of the Hub."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    max_rows: int | None = field(default=None, metadata={"help": "Featurize only the first rows."})
    stream: bool = field(
        default=False,
        metadata={
            "help": "Read the dataset row by row, no further than --max_rows, in place of downloading it whole. Its rows lie in the cache of datasets "
            "until the command ends."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace another index in the output folder."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run code that a checkpoint brings along. Without it, such checkpoints are refused. An index does not remember it."
        },
    )
    shard_index: int | None = field(
        default=None,
        metadata={"help": "Make only this part of the files of features, from 0; `hf-trak merge` puts them together."},
    )
    num_shards: int | None = field(default=None, metadata={"help": "Into how many parts, such as the jobs of an array."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Say what it would take (time, disk, memory, engine, columns), from some rows, and write nothing."},
    )

    def __post_init__(self) -> None:
        if (self.shard_index is None) != (self.num_shards is None):
            raise ValueError("--shard-index and --num-shards go together: which part this job makes, and of how many.")
        if self.overwrite and self.num_shards is not None:
            raise ValueError("With --shard-index, --overwrite would delete what other jobs have made. Delete the folder first.")


def main(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Parse and run."""
    parser = make_parser([FeaturizeArguments, FeatureArguments], command="featurize", usage=_USAGE, description=_DESCRIPTION)
    args, features = parse(parser, arguments)
    return run(args, features, arguments)


def run(args: FeaturizeArguments, features: FeatureArguments, given: Sequence[str] = ()) -> dict[str, Any] | None:
    """Build the index, or a part of one, say where it lies, and return that."""
    config, ensemble = features.trak_config(), features.ensemble(args.model, revision=args.revision)
    rows_at_a_time(features.batch_size, "--batch_size")
    if features.shard_rows < 1:
        raise ValueError(f"--shard_rows must be at least 1, but is {features.shard_rows}.")
    if args.revision is not None and all(Path(model).is_dir() for model in args.model):
        raise ValueError(f"--revision is for repositories, but --model names folders: {', '.join(args.model)}.")

    with uncollected(for_good=True):
        from transformers import AutoConfig, PreTrainedModel  # noqa: F401  what loading a model needs, whatever the model

        from hf_trak.cli.data import load_rows
        from hf_trak.cli.main import quiet_libraries, say_which_columns
        from hf_trak.distributed import current_processes, warn_of_lone_process
        from hf_trak.index import AttributionIndex
        from hf_trak.tasks import import_task
        from hf_trak.tasks.auto import ASKED_FOR

        quiet_libraries()
        say_which_columns()
    if args.shard_index is None and (warning := warn_of_lone_process()):
        print(f"hf-trak: warning: {warning}", file=sys.stderr)
    is_first = args.shard_index is not None or current_processes().is_first
    task = None
    if args.task in ASKED_FOR:
        config = replace(config, task=str(args.task))
    elif args.task is not None:
        task = import_task(args.task)
    dataset = load_rows(
        args.dataset,
        split=args.split,
        config=args.dataset_config,
        revision=args.dataset_revision,
        max_rows=args.max_rows,
        stream=args.stream,
    )
    begin = time.perf_counter()
    arguments: dict[str, Any] = {
        "models": ensemble,
        "dataset": dataset,
        "config": config,
        "processing_class": args.processor,
        "task": task,
        "trust_remote_code": args.trust_remote_code,
        "batch_size": features.rows_at_a_time(),
        "shard_rows": features.shard_rows,
        "keep_columns": features.kept_columns(),
    }
    if args.dry_run:
        estimate = AttributionIndex.estimate(**arguments)
        print(estimate)
        return {"estimate": asdict(estimate)}
    if args.shard_index is not None and args.num_shards is not None:
        AttributionIndex.build_shards(
            args.output, shard_index=args.shard_index, num_shards=args.num_shards, command=_without_part(given), **arguments
        )
        say(
            f"\nPart {args.shard_index} of {args.num_shards} is done. When all are:\n\n    hf-trak merge {mask_secrets(args.output)}"
        )
        return {"index": mask_secrets(args.output), "shard_index": args.shard_index, "num_shards": args.num_shards}
    index = AttributionIndex.build(args.output, overwrite=args.overwrite, **arguments)
    if not is_first:
        return None
    say(describe_index(index, args.output, seconds=time.perf_counter() - begin))
    return facts_of(index)


def facts_of(index: AttributionIndex) -> dict[str, Any]:
    """Return what was made, for machines."""
    return {
        "index": mask_secrets(str(index.home)),
        "task": index.config.task,
        "n_rows": index.n_rows,
        "n_members": len(index.members),
        "n_checkpoints": index.n_checkpoints,
        "proj_dim": index.config.proj_dim,
        "coverage": index.members[0].info["coverage"],
    }


def _without_part(given: Sequence[str]) -> list[str]:
    """Return the command that started this job, but for its part."""
    kept, skip = ["hf-trak", "featurize"], False
    for argument in given:
        name = argument.partition("=")[0].replace("_", "-")
        if not skip and name not in ("--shard-index", "--num-shards"):
            kept.append(mask_secrets(argument))
        skip = not skip and name in ("--shard-index", "--num-shards") and "=" not in argument
    return kept


def describe_index(index: AttributionIndex, output: str, *, seconds: float) -> str:
    """Say what was made, and how to load and ask it."""
    n_members = len(index.members)
    points = describe_points(index)
    return (
        f"\n{index.n_rows:,} rows, {n_members} member{'s' * (n_members > 1)}, "
        f"{index.members[0].info['coverage']:.1%} of the trainable parameters covered, {seconds:.1f} s.\n{points}\n"
        f"{how_to_load(index.home)}\n\nNow ask it:\n\n    hf-trak attribute {mask_secrets(output)} --queries DATASET --output hits.jsonl"
    )


def describe_points(index: AttributionIndex) -> str:
    """Say of which points of which path an index is, and what follows from that; nothing where it is of checkpoints themselves."""
    from hf_trak.hub.cards import describe_paths

    lines = describe_paths([member.info for member in index.members], index.config.out_to_loss_power)
    return "".join(f"{line}\n" for line in lines)


def how_to_load(folder: Path) -> str:
    """Say where an index lies, with code that reads its columns with `datasets` alone."""
    from hf_trak.storage.object_store import ObjectPath

    if isinstance(folder, ObjectPath):
        return (
            f"The index lies in {folder}. Its columns load anywhere:\n\n"
            "    from datasets import load_dataset\n"
            f'    rows = load_dataset("parquet", data_files="{folder}/member_0/*.parquet", split="train")'
        )
    return (
        f"The index lies in {folder}. Its columns load anywhere:\n\n"
        "    from datasets import load_dataset\n"
        f'    rows = load_dataset("{folder.resolve()}", "member_0", split="train")'
    )
