"""`hf-trak select`: the training rows that are best for a target set, or hurt it most, as a folder that `load_dataset` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_trak.cli.parsing import Collect, LoadingArguments, make_parser, name_positions, parse, rows_at_a_time

_SHOWN = 10
_USAGE = "INDEX --target DATASET --budget ROWS --output FOLDER [--train DATASET] [options]"
_DESCRIPTION = """\
Choose the training rows to train on for a target: rows of what the model should become good at, with right labels. The folder holds
them with their row numbers and scores, the best first, and a card that says how they were chosen.

examples:
  hf-trak select my-index --target validation.parquet --budget 5% --output subset      (of an index with kept columns)
  hf-trak select my-index --target validation.parquet --budget 500 --train train.parquet --output subset
  hf-trak select my-index --target tasks.parquet --group_by task --method less --train train.parquet --budget 5% --output subset
  hf-trak select my-index --target validation.parquet --budget 5% --drop --output harmful
"""


@dataclass(kw_only=True)
class SelectArguments(LoadingArguments):
    """Which rows of which index, for what, and where they go."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    target: str = field(metadata={"help": "The target: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub."})
    budget: str = field(metadata={"help": "Rows to choose: a number such as 500, or a share such as 5%% or 0.05."})
    output: str = field(metadata={"help": "Folder for the rows and their card."})
    train: str | None = field(
        default=None,
        metadata={
            "help": "The training set, in any order and among other rows, whose columns are written. By default, the columns that the index "
            "kept."
        },
    )
    method: str = field(
        default="trak",
        metadata={
            "help": "trak, the index's scores; or less, cosines of Adam's steps with the target's gradients, which takes a pass over the "
            "training rows for each checkpoint.",
            "choices": ["trak", "less"],
        },
    )
    aggregate: str | None = field(
        default=None,
        metadata={
            "help": "Over the target's rows: mean, or max; with --group_by, max over the groups' means.",
            "choices": ["mean", "max"],
        },
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Column of the target with the group, such as the task, of each row."}
    )
    balance: str | None = field(
        default=None, metadata={"help": "Column of the training set of which each value gets the same share of the budget."}
    )
    diversity: float = field(
        default=0.0, metadata={"help": "From 0 to below 1: how much rows lose that are like one that is chosen already."}
    )
    drop: bool = field(default=False, metadata={"help": "Find the rows that hurt the target most, in place of the best."})
    lower_output: bool | None = field(
        default=None,
        metadata={"help": "Prefer rows that lower the target's outputs, as where the output of a task of your own is a loss."},
    )
    damping: str | None = field(default=None, metadata={"help": "A number or auto, in place of the index's damping."})
    out_to_loss_power: float | None = field(
        default=None, metadata={"help": "What 1 - p is raised to, 0 to 1, in place of the index's; 1 is the paper's."}
    )
    combination: str | None = field(
        default=None,
        metadata={"help": "How members are combined, in place of the index's way.", "choices": ["scaled", "means"]},
    )
    optimizer: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of less: the optimizer.pt of each checkpoint, in order; or none, for gradients in place of Adam's steps. By default, "
            "those beside the checkpoints.",
            "action": Collect,
        },
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Of less: the weight of each checkpoint; by default the learning rates that Trainer logged."},
    )
    target_config: str | None = field(default=None, metadata={"help": "Configuration of the target's dataset."})
    target_split: str = field(default="validation", metadata={"help": "Split of the target."})
    max_target_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of the target."})
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training set."})
    train_split: str = field(default="train", metadata={"help": "Split of the training set."})
    batch_size: str = field(default="auto", metadata={"help": "Rows at a time; auto halves when memory runs out."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier subset in the output folder."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([SelectArguments], command="select", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: SelectArguments) -> dict[str, Any]:
    """Choose the rows, write them, show the first, and return those and where all are."""
    budget, batch_size = read_budget(args.budget), rows_at_a_time(args.batch_size, "--batch_size")

    from hf_trak.cli.data import load_rows
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.querying.subsets import check_output

    quiet_libraries()
    check_output(Path(args.output), overwrite=args.overwrite)
    index = args.load(args.index)
    target = load_rows(args.target, split=args.target_split, config=args.target_config, max_rows=args.max_target_rows)
    train = None if args.train is None else load_rows(args.train, split=args.train_split, config=args.train_config)
    optimizer: Any = args.optimizer or "auto"
    shared = (
        "method",
        "aggregate",
        "group_by",
        "balance",
        "diversity",
        "drop",
        "lower_output",
        "out_to_loss_power",
        "combination",
    )
    found = index.select(
        target,
        budget,
        train=train,
        damping=None if args.damping is None else replace(index.config, damping=args.damping).damping,  # type: ignore[arg-type]
        optimizer=optimizer[0] if optimizer in (["none"], ["auto"]) else optimizer,
        learning_rates=args.learning_rates,
        output=args.output,
        overwrite=args.overwrite,
        batch_size=batch_size,
        **{name: getattr(args, name) for name in shared},
    )
    lines = [f"{'row':>10}  score"]
    lines += [
        f"{row:>10,}  {score:+.3g}" for row, score in zip(found["trak_row"][:_SHOWN], found["trak_score"][:_SHOWN], strict=True)
    ]
    print("\n".join(lines))
    what = "that hurt the target most" if args.drop else "chosen"
    print(f"\n{len(found):,} of {index.n_rows:,} training rows {what}: {args.output}")
    if found.column_names == ["trak_row", "trak_score"]:
        print("They have no columns but these: the index kept none. Give the training set with --train to have its columns.")
    first = found.select_columns(["trak_row", "trak_score"]).select(range(min(_SHOWN, len(found)))).to_list()
    return {"rows": args.output, "n_rows": len(found), "of": index.n_rows, "first": first}


def read_budget(text: str) -> int | float:
    """Return a number of rows, or a share of them.

    Raises:
        ValueError: If it is neither.
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(
            f"--budget must be a number of rows such as 500, or a share such as 5% or 0.05, but is {text!r}."
        ) from None
