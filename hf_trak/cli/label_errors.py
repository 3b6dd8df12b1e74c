"""`hf-trak label-errors`: the training rows whose labels look wrong, as a table and a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.cli.parsing import LoadingArguments, make_parser, name_positions, parse, rows_at_a_time
from hf_trak.messages import say

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.index import AttributionIndex
    from hf_trak.querying.examples import Example

_SHOWN = 10
_BYTES_PER_ROW = 160  # of the numbers of a row, as text
_USAGE = "INDEX [--train DATASET] [--validation DATASET] --output FILE [options]"
_DESCRIPTION = """\
List the training rows of a classifier whose labels look wrong, the most suspicious first: other rows oppose the label, or the model doubts
it. Held-out rows whose labels can be trusted (--validation) help most where many training labels are wrong. The file has each row's rank,
row number, score, given and suggested label, and the columns of the training set; without --train, the columns that the index kept.

examples:
  hf-trak label-errors my-index --output suspicious.parquet      (of an index with --keep_columns text,label)
  hf-trak label-errors my-index --train train.parquet --output suspicious.parquet
  hf-trak label-errors my-index --train train.parquet --validation validation.parquet --budget 0.05 --output suspicious.parquet
"""


@dataclass(kw_only=True)
class LabelErrorsArguments(LoadingArguments):
    """Which index, which rows, and where the answer goes."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    output: str = field(
        metadata={"help": "File for the rows, .parquet or .jsonl: one line per row, the most suspicious first."}
    )
    train: str | None = field(
        default=None,
        metadata={
            "help": "The training set: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub, in any order and among other rows. "
            "An index that kept its label column needs none."
        },
    )
    validation: str | None = field(
        default=None, metadata={"help": "Held-out rows whose labels can be trusted, with the columns of the training set."}
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "Rows to write: a number such as 200, or a share such as 0.05; by default all of them."},
    )
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training set."})
    train_split: str = field(default="train", metadata={"help": "Split of the training set."})
    validation_config: str | None = field(default=None, metadata={"help": "Configuration of the held-out rows' dataset."})
    validation_split: str = field(default="validation", metadata={"help": "Split of the held-out rows."})
    max_validation_rows: int | None = field(default=None, metadata={"help": "Use only the first held-out rows."})
    damping: str | None = field(default=None, metadata={"help": "A number or auto, in place of the index's damping."})
    batch_size: str = field(default="auto", metadata={"help": "Held-out rows at a time; auto halves when memory runs out."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output file."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([LabelErrorsArguments], command="label-errors", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: LabelErrorsArguments) -> dict[str, Any]:
    """Rank the rows, write them, show the first, and return those and where all are."""
    output, budget = Path(args.output), _budget(args.budget)
    batch_size = rows_at_a_time(args.batch_size, "--batch_size")
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output must end in .jsonl or .parquet, but is {output}.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists. Choose another place, or pass --overwrite.")

    from hf_trak.storage.replacing import refuse_target

    refuse_target(output, {"--train": args.train, "--validation": args.validation, "--model": args.model})
    from hf_trak.cli.attribute import write_hits
    from hf_trak.cli.data import load_rows
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.storage.outputs import naming, output_file

    quiet_libraries()
    index = args.load(args.index)
    train = load_train(args, index)
    validation = None
    if args.validation is not None:
        options: dict[str, Any] = {"config": args.validation_config, "max_rows": args.max_validation_rows}
        validation = load_rows(args.validation, split=args.validation_split, **options)
    damping = None if args.damping is None else replace(index.config, damping=args.damping).damping  # type: ignore[arg-type]
    with output_file(output, n_bytes=_BYTES_PER_ROW * index.n_rows) as unfinished:
        found = index.label_errors(validation, train=train, budget=budget, damping=damping, batch_size=batch_size)
        with naming(output):
            write_hits(found, unfinished, is_parquet=output.suffix == ".parquet")
    say(f"\n{suspects(found, train, index)}\n\n{len(found):,} of {index.n_rows:,} training rows, by suspicion: {output}")
    names = [name for name in ("row", "score", "given_label", "suggested_label", "doubt") if name in found.column_names]
    first = found.select_columns(names).select(range(min(_SHOWN, len(found)))).to_list()
    return {"rows": output, "n_rows": len(found), "of": index.n_rows, "first": first}


def load_train(args: LabelErrorsArguments, index: AttributionIndex) -> Dataset | None:
    """Return the training set in the index's order, if one was given."""
    from hf_trak.cli.data import load_rows

    if args.train is None:
        return None
    train = load_rows(args.train, split=args.train_split, config=args.train_config)
    try:
        return index.align(train)
    except ValueError as error:
        raise ValueError(f"--train {args.train}: {error}") from error


def _budget(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--budget must be a number of rows or a share of them, but is {text!r}.") from None


def suspects(found: Dataset, train: Dataset | None, index: AttributionIndex) -> str:
    """Return a table of the first rows: suspicion, given and suggested label, and the row itself."""
    from hf_trak.querying.examples import ExampleReader
    from hf_trak.querying.report import label_errors_table

    config, kept = index.config, index.kept_rows
    source = train if train is not None else kept if kept.column_names else None
    names: dict[str, Any] = {name: getattr(config, name) for name in ("text_columns", "image_column", "label_column")}
    if source is not None:
        there = set(source.column_names)
        names["text_columns"] = tuple(name for name in names["text_columns"] or () if name in there) or None
        names = {name: value for name, value in names.items() if name == "text_columns" or value in there}
    reader = ExampleReader(source, **(names if source is not None else {}))
    has_labels = "suggested_label" in found.features
    classes = getattr(found.features.get("suggested_label"), "names", None)
    shown: list[tuple[Example, str | None, float, float]] = []
    for row in found.select(range(min(_SHOWN, len(found)))):
        label = row["suggested_label"] if has_labels else None
        suggested = None if label is None else str(classes[label]) if classes else str(label)
        shown.append((reader[row["row"]], suggested, row["score"], row["doubt"]))
    return label_errors_table(shown)
