"""`hf-trak attribute`: queries to the training examples that raised and lowered their outputs most."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.cli.parsing import LoadingArguments, make_parser, name_positions, parse, rows_at_a_time
from hf_trak.messages import say

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.cli.hit_blocks import HitBlocks
    from hf_trak.index import AttributionIndex
    from hf_trak.querying.examples import Attribution, Example, ExampleReader, LanguageRows

_SHOWN_QUERIES = 3
_WRITTEN_QUERIES = 1000  # at a time
_REPORTED_QUERIES = 20
_SHOWN_HITS = 5
_USAGE = "INDEX --queries DATASET --output FILE [options]"
_DESCRIPTION = """\
Ask an index which training examples raised (proponents) and lowered (opponents) the model's output on your queries. Queries
have the columns of the training set; their labels say which output is meant.

examples:
  hf-trak attribute my-index --queries validation.parquet --output hits.jsonl
  hf-trak attribute me/sst2-trak --queries stanfordnlp/sst2 --train stanfordnlp/sst2 --output hits.parquet --report report
  hf-trak attribute my-index --queries unlabelled.csv --target prediction --output hits.jsonl
  hf-trak attribute my-index --queries mistakes.csv --contrast prediction label --aggregate mean --output hits.jsonl
"""


@dataclass(kw_only=True)
class AskingArguments(LoadingArguments):
    """Which index to ask, and what with."""

    index: str = field(metadata={"help": "Folder, dataset repository or object store URL of an index."})
    top_k: int = field(default=10, metadata={"help": "Proponents and opponents per query."})
    damping: str | None = field(default=None, metadata={"help": "A number or auto, in place of the index's damping."})
    out_to_loss_power: float | None = field(
        default=None, metadata={"help": "What 1 - p is raised to, 0 to 1, in place of the index's; 1 is the paper's."}
    )
    combination: str | None = field(
        default=None,
        metadata={
            "help": "How members are combined, in place of the index's way: scaled, or means (the paper's).",
            "choices": ["scaled", "means"],
        },
    )
    documents: str | None = field(
        default=None,
        metadata={
            "help": "Of an index of chunks (--chunk_overlap), rank documents: by their strongest chunk (max), or the sum of their chunks.",
            "choices": ["max", "sum"],
        },
    )
    batch_size: str = field(default="auto", metadata={"help": "Queries at a time; auto halves when memory runs out."})
    max_memory: str | None = field(
        default=None,
        metadata={"help": "Memory for solving and scoring, such as 2GB, beside the model; by default 2 GB or what it takes."},
    )
    train: str | None = field(
        default=None,
        metadata={
            "help": "The training set, to show its examples, in any order and among other rows. An index with kept columns needs none."
        },
    )
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training set."})
    train_split: str = field(default="train", metadata={"help": "Split of the training set."})
    report: str | None = field(default=None, metadata={"help": "Folder for report.html and report.png."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output file and the report."})


@dataclass(kw_only=True)
class AttributeArguments(AskingArguments):
    """What to ask which index, and where the answer goes."""

    queries: str = field(metadata={"help": "The queries: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub."})
    output: str = field(metadata={"help": "File for the hits, .jsonl or .parquet: one line per query."})
    queries_config: str | None = field(default=None, metadata={"help": "Configuration of the queries' dataset."})
    split: str = field(default="validation", metadata={"help": "Split of the queries."})
    max_queries: int | None = field(default=None, metadata={"help": "Use only the first queries."})
    target: str = field(
        default="label",
        metadata={
            "help": "Of classifiers, which output: label, the query's own; prediction, the class that the model predicts; or a class, by "
            "its name or its number in the training set. All but label need no label column. Of other tasks, a column of the queries that "
            "holds another answer."
        },
    )
    contrast: list[str] | None = field(
        default=None,
        metadata={"help": "Two of these: what made the model say the first and not the second."},
    )
    aggregate: str | None = field(
        default=None,
        metadata={
            "help": "Take all queries as one: the mean or sum of their features, or, of each training row, its largest score "
            "(nearest).",
            "choices": ["mean", "sum", "nearest"],
        },
    )
    direction: str = field(
        default="pair",
        metadata={
            "help": "Of image-caption pairs: pair, image (how it tells its caption) or caption (how it tells its image)."
        },
    )


def main(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Parse and run."""
    parser = make_parser([AttributeArguments], command="attribute", usage=_USAGE, description=_DESCRIPTION)
    return run(*parse(parser, name_positions(arguments, ["index"])))


def run(args: AttributeArguments) -> dict[str, Any] | None:
    """Attribute the queries, write the hits, show the first, and return where they are."""
    output = Path(args.output)
    batch_size = rows_at_a_time(args.batch_size, "--batch_size")
    check_targets(args, output)

    from hf_trak.cli.data import load_rows
    from hf_trak.cli.main import quiet_libraries
    from hf_trak.distributed import current_processes, rank_and_size
    from hf_trak.querying.examples import read_attributions, train_reader
    from hf_trak.querying.report import save_report, table
    from hf_trak.querying.report_facts import row_links, trust_notes, with_links
    from hf_trak.scoring.memory import parse_memory
    from hf_trak.storage.outputs import naming, output_file

    quiet_libraries()
    parse_memory(args.max_memory)
    current_processes()  # joins those of a launcher
    first = rank_and_size()[0] == 0
    index = args.load(args.index)
    queries = load_rows(args.queries, split=args.split, config=args.queries_config, max_rows=args.max_queries)
    train = load_train(args, index)
    options = {**score_options(args, index), "direction": args.direction, "batch_size": batch_size, "progress": first}
    options.update(_question(args))
    ask, blocks = _asking(args, index, queries, output, options)
    if not first:  # processes share the ranking; one writes
        ask()
        return None
    kept = index.kept_rows.mean_bytes if output.suffix == ".parquet" else index.kept_rows.mean_bytes_as_text
    n_bytes = most_bytes(len(queries), min(args.top_k, index.n_rows), index.n_rows, kept=kept)
    with output_file(output, n_bytes=n_bytes) as unfinished:
        hits = ask()
        with naming(output):
            write_hits(hits, unfinished, is_parquet=output.suffix == ".parquet")
    if blocks is not None:
        blocks.remove()

    language = _language_rows(args, index)
    readers = _query_reader(args, index, queries, language), train_reader(index.config, index.kept_rows, train, language)
    shown = read_attributions(hits, *readers, rows=list(range(min(_SHOWN_QUERIES, len(hits)))), top_k=_SHOWN_HITS)
    say(f"\n{table(shown)}\n\nHits of {len(hits):,} queries: {output}")
    paths: list[Path] = []
    if args.report is not None:
        reported = read_attributions(hits, *readers, rows=list(range(min(_REPORTED_QUERIES, len(hits)))), top_k=_SHOWN_HITS)
        reported = _with_controls(reported, index, queries, readers[1], options)
        title = f"Attributions of {Path(args.queries).name}"
        reported = with_links(reported, row_links(index, train))
        paths = save_report(reported, args.report, title=title, trust=trust_notes(index, train))
        say("\n".join(f"Report: {path}" for path in paths))
    return {"hits": output, "n_queries": len(hits), "report": paths}


def _asking(
    args: AttributeArguments, index: AttributionIndex, queries: Dataset, output: Path, options: dict[str, Any]
) -> tuple[Callable[[], Dataset], HitBlocks | None]:
    """Return what ranks the queries, and what keeps the blocks of them that are done, where there are several."""
    from hf_trak.cli import hit_blocks

    if len(queries) <= hit_blocks.BLOCK_QUERIES or args.aggregate is not None:
        return lambda: index.attribute(queries, args.top_k, **options), None
    ways = {name: options[name] for name in ("direction", "documents", "out_to_loss_power", "combination")}
    decisive = {"top_k": args.top_k, "damping": index.resolve_damping(options["damping"]), **ways, **_question(args)}
    blocks = hit_blocks.HitBlocks(output, hit_blocks.identity_of_hits(index, queries, decisive))

    def say(text: str) -> None:
        if options["progress"]:
            print(text, file=sys.stderr)

    def ask() -> Dataset:
        return hit_blocks.attribute_in_blocks(
            queries, lambda some: index.attribute(some, args.top_k, **options), blocks, say=say
        )

    return ask, blocks


def _with_controls(
    attributions: Sequence[Attribution], index: AttributionIndex, queries: Dataset, train: Any, options: dict[str, Any]
) -> list[Attribution]:
    """Return the attributions with their controls: of the first queries, or of all queries as one."""
    from hf_trak.querying.questions import Question
    from hf_trak.querying.report_facts import controls_of, with_controls

    question = Question(*(options[name] for name in ("target", "contrast", "direction", "aggregate")))
    asked = queries if question.aggregate is not None else queries.select(range(len(attributions)))
    scoring = {name: options[name] for name in ("damping", "out_to_loss_power", "combination")}
    found = controls_of(
        index, asked, train, top_k=_SHOWN_HITS, question=question, options=index.score_options(**scoring),
        batch_size=options["batch_size"],
    )  # fmt: skip
    return with_controls(attributions, found)


def _question(args: AttributeArguments) -> dict[str, Any]:
    """Return which output of the queries is asked about, as [`AttributionIndex.attribute`] takes it."""
    return {
        "target": args.target,
        "contrast": None if args.contrast is None else tuple(args.contrast),
        "aggregate": args.aggregate,
    }


def most_bytes(n_query: int, top_k: int, n_rows: int, *, kept: int = 0) -> int:
    """Return how large a file of hits is: a number has at most 24 characters and a separator, a row as many as `n_rows`.

    Args:
        kept (`int`): Bytes of the kept columns of a training row, in the mean.
    """
    return n_query * (256 + 2 * top_k * (26 + len(str(n_rows)) + 2 + kept)) + (1 << 16)


def write_hits(hits: Dataset, path: Path, *, is_parquet: bool) -> None:
    """Write one line per query into a file that is there; every score keeps all its digits.

    JSON Lines have no images or other bytes; of columns of these, Parquet alone has the content.
    """
    with path.open("r+b") as file:
        if is_parquet:
            hits.to_parquet(file)
        else:
            hits = hits.remove_columns([name for name, kind in hits.features.items() if not _is_plain(kind)])
            for first in range(0, len(hits), _WRITTEN_QUERIES):
                some = hits.select(range(first, min(first + _WRITTEN_QUERIES, len(hits))))
                file.writelines(f"{json.dumps(hit, default=str)}\n".encode() for hit in some)
        file.truncate()


def _is_plain(kind: Any) -> bool:
    """Return whether values of a type are text, numbers, or made of these."""
    if isinstance(kind, dict):
        return all(map(_is_plain, kind.values()))
    if hasattr(kind, "feature"):
        return _is_plain(kind.feature)
    return hasattr(kind, "dtype") and "binary" not in kind.dtype and not hasattr(kind, "decode_example")


def check_targets(args: AskingArguments, output: Path | None) -> None:
    """Refuse files that are there or belong to others, and names that say no format, before anything is computed."""
    from hf_trak.storage.replacing import refuse_target

    read = {f"--{name}": getattr(args, name, None) for name in ("queries", "train", "model", "processor")}
    if output is not None:
        refuse_target(output, read)
    if args.report is not None:
        refuse_target(Path(args.report))
    if output is not None and output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output must end in .jsonl or .parquet, but is {output}.")
    if args.report is not None and Path(args.report).exists() and not Path(args.report).is_dir():
        raise ValueError(f"--report must name a folder, but {args.report} is a file.")
    taken = [output] if output is not None and output.exists() else []
    if args.report is not None:
        taken += [path for name in ("report.html", "report.png") if (path := Path(args.report) / name).exists()]
    if taken and not args.overwrite:
        raise ValueError(f"{', '.join(map(str, taken))} exists. Choose another place, or pass --overwrite.")


def _language_rows(args: AttributeArguments, index: AttributionIndex) -> LanguageRows | None:
    """Return what makes the text of a language model's rows, with the tokenizer of the first checkpoint; None for other tasks."""
    from hf_trak.featurizing.identity import recorded_checkpoint, recorded_processor
    from hf_trak.querying.examples import LANGUAGE_TASKS, LanguageRows
    from hf_trak.sources.processors import find_processing_class

    config, info = index.config, index.members[0].info
    if config.task not in LANGUAGE_TASKS:
        return None
    source = args.model[0] if args.model else recorded_checkpoint(index.folder, info["checkpoint"])
    revision = None if args.model else info["checkpoint"]["revision"]
    given = args.processor or recorded_processor(index.folder, info)
    try:
        tokenizer = find_processing_class(given, source, revision, trust_remote_code=args.trust_remote_code)
    except ValueError:  # rows that were tokenized before need none: their tokens are shown as numbers
        tokenizer = None
    return LanguageRows(config.task, tokenizer, text_columns=config.text_columns, label_column=config.label_column)


def _query_reader(
    args: AttributeArguments, index: AttributionIndex, queries: Dataset, language: LanguageRows | None
) -> ExampleReader | list[Example]:
    """Return what shows the queries: themselves, with what is asked of each, or how many they are where they are one."""
    from hf_trak.querying.examples import Example, row_reader

    asked = " against ".join(args.contrast) if args.contrast else args.target if args.target != "label" else ""
    if args.aggregate is not None:
        label = f"{args.aggregate} of {len(queries):,} queries" + (f", {asked}" if asked else "")
        return [Example(0, label=label)]
    notes = dict.fromkeys(range(len(queries)), f"asked: {asked}") if asked else None
    return row_reader(index.config, queries, language, notes=notes)


def load_index(args: AskingArguments) -> AttributionIndex:
    """Return the index that the flags name."""
    from hf_trak.scoring.memory import parse_memory

    parse_memory(args.max_memory)
    return args.load(args.index)


def score_options(args: AskingArguments, index: AttributionIndex) -> dict[str, Any]:
    """Return the flags of scoring, as [`AttributionIndex.attribute`] takes them."""
    damping = None if args.damping is None else replace(index.config, damping=args.damping).damping  # type: ignore[arg-type]
    return {
        "damping": damping,
        "out_to_loss_power": args.out_to_loss_power,
        "combination": args.combination,
        "max_memory": args.max_memory,
        "documents": args.documents,
    }


def load_train(args: AskingArguments, index: AttributionIndex) -> Dataset | None:
    """Return the training set, in the index's order, where it is given.

    Raises:
        ValueError: If it is another.
    """
    if args.train is None:
        return None
    from hf_trak.cli.data import load_rows

    train = load_rows(args.train, split=args.train_split, config=args.train_config)
    try:
        return index.align(train)
    except ValueError as error:
        raise ValueError(f"--train {args.train}: {error}") from error
