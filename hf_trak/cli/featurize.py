"""`hf-trak featurize`: a training set to an index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_trak.cli.parsing import Collect, make_parser, parse
from hf_trak.feature_args import FeatureArguments

_USAGE = "--model MODEL --dataset DATASET --output FOLDER [options]"
_DESCRIPTION = """\
Make an index: the features of a training set under one or more checkpoints of a model. It costs about one more epoch of
training. Stopped at any moment, the same command goes on where it stopped.

examples:
  hf-trak featurize --model my-bert --dataset train.parquet --output my-index
  hf-trak featurize --model run/members/epoch-0002 run/members/epoch-0003 --dataset stanfordnlp/sst2 --output my-index
"""


@dataclass
class FeaturizeArguments:
    """What to featurize, and where the index goes."""

    model: list[str] = field(
        metadata={"help": "Folder or repository of a checkpoint; several make an ensemble.", "action": Collect}
    )
    dataset: str = field(metadata={"help": "The training set: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub."})
    output: str = field(metadata={"help": "Folder for the index."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the repositories in --model."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset of the Hub."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    max_rows: int | None = field(default=None, metadata={"help": "Featurize only the first rows."})
    overwrite: bool = field(default=False, metadata={"help": "Replace another index in the output folder."})


def main(arguments: Sequence[str]) -> None:
    """Parse and run."""
    parser = make_parser([FeaturizeArguments, FeatureArguments], command="featurize", usage=_USAGE, description=_DESCRIPTION)
    run(*parse(parser, arguments))


def run(args: FeaturizeArguments, features: FeatureArguments) -> None:
    """Build the index and say where it lies."""
    config, counts = features.trak_config(), features.member_counts()

    from hf_trak.cli.data import load_rows
    from hf_trak.cli.quiet import hush
    from hf_trak.index import AttributionIndex

    hush()
    dataset = load_rows(
        args.dataset, split=args.split, config=args.dataset_config, revision=args.dataset_revision, max_rows=args.max_rows
    )
    begin = time.perf_counter()
    index = AttributionIndex.build(
        args.output,
        models=args.model,
        dataset=dataset,
        config=config,
        revision=args.revision,
        **counts,
        batch_size=features.rows_at_a_time(),
        shard_rows=features.shard_rows,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - begin
    n_members = len(index.members)
    print(
        f"\n{index.n_rows:,} rows, {n_members} member{'s' * (n_members > 1)}, "
        f"{index.members[0].info['coverage']:.1%} of the trainable parameters covered, {seconds:.1f} s.\n"
    )
    print(how_to_load(index.folder))
    print(f"\nNow ask it:\n\n    hf-trak attribute --index {args.output} --queries DATASET --output hits.jsonl")


def how_to_load(folder: Path) -> str:
    """Say where an index lies, with code that reads its columns with `datasets` alone."""
    return (
        f"The index lies in {folder}. Its columns load anywhere:\n\n"
        "    from datasets import load_dataset\n"
        f'    rows = load_dataset("{folder.resolve()}", "member_0", split="train")'
    )
