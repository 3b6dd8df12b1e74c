"""`hf-trak demo`: from data to attributions in about a minute, with labels flipped on purpose and found again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.cli.parsing import make_parser, name_positions, parse
from hf_trak.cli.results import commit
from hf_trak.messages import say
from hf_trak.storage.files import read_json, refuse_url, remove_file, write_json
from hf_trak.storage.snapshots import remove_snapshot

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.cli.demo_data import DemoData
    from hf_trak.index import AttributionIndex


@dataclass
class DemoArguments:
    """What to try, and where it goes."""

    data: str = field(
        default="images",
        metadata={
            "help": "images: scikit-learn's digits and a small ResNet; text: docstrings of Python's standard library and a small ModernBERT.",
            "choices": ["images", "text"],
        },
    )
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the model, the index and the report: by default hf_trak_demo, or hf_trak_demo_text."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier demo in the output folder."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the flips, the training and the sketch."})
    flip_fraction: float | None = field(
        default=None, metadata={"help": "Share of training labels to flip: 0.1 by default; none with --model."}
    )
    proj_dim: int = field(default=2048, metadata={"help": "Numbers kept per example."})
    members: str = field(
        default="final", metadata={"help": "Checkpoints of the training run: final, or epoch:K for the last K."}
    )
    damping: str = field(
        default="auto", metadata={"help": "A multiple of the Gram matrix's mean eigenvalue; 0 is the paper's."}
    )
    epochs: int | None = field(
        default=None, metadata={"help": "Epochs of training: 6 for images, 3 for text, 3 with --model --train."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the training: 3e-3 for images, 2e-3 for text, 5e-5 with --model --train."}
    )
    model: str | None = field(default=None, metadata={"help": "Your own classification model: a folder or repository."})
    processor: str | None = field(
        default=None,
        metadata={"help": "Folder or repository of its tokenizer or image processor; by default those saved with --model."},
    )
    train: bool = field(default=False, metadata={"help": "Fine-tune --model on --dataset first."})
    dataset: str | None = field(default=None, metadata={"help": "Its training set: a file, a folder, or a dataset of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    split: str = field(default="train", metadata={"help": "Split to learn from."})
    queries: str | None = field(default=None, metadata={"help": "Held-out rows, if they are not in --dataset."})
    query_split: str = field(default="validation", metadata={"help": "Split of the held-out rows."})
    max_rows: int | None = field(default=None, metadata={"help": "Use only the first training rows."})
    max_queries: int | None = field(default=200, metadata={"help": "Use only the first held-out rows of --dataset."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two text columns; found by default."})
    image_column: str | None = field(default=None, metadata={"help": "The image column; found by default."})
    label_column: str | None = field(default=None, metadata={"help": "The label column; 'labels' or 'label' by default."})


TOP = 0.1
_N_SUSPECTS = 10


def show(
    args: DemoArguments,
    data: DemoData,
    index: AttributionIndex,
    hits: Dataset,
    suspicion: np.ndarray,
    notes: dict[int, str],
    output: Path,
) -> None:
    """Print and save the attributions of three held-out rows, and the most suspicious labels."""
    from hf_trak.querying.examples import ExampleReader, Hit, read_attributions
    from hf_trak.querying.questions import Question
    from hf_trak.querying.report import save_report, suspects_table, table
    from hf_trak.querying.report_facts import controls_of, row_links, trust_notes, with_controls, with_links

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
    say(f"\n{table(attributions)}\n\n{suspects_table(suspects)}")
    intro = (
        f"{len(data.train):,} training rows of {data.name}. Training on a proponent raised the model's output for the query, "
        "training on an opponent lowered it. The output is log p/(1 - p) of the query's label: negative where the model is wrong."
    )
    asked = data.queries.select(rows)
    controls = controls_of(index, asked, train, top_k=5, question=Question(), options=index.score_options())
    attributions = with_links(with_controls(attributions, controls), row_links(index, data.train))
    title = f"hf-trak demo: {data.name}"
    save_report(attributions, output, title=title, intro=intro, suspects=suspects, trust=trust_notes(index, data.train))


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


_MARKER = ".hf_trak_demo.json"
_USAGE = "[images | text] [--output FOLDER] [options]"
_DESCRIPTION = """\
Train a small model after flipping 10 % of its training labels, featurize, attribute held-out rows, and count how many flipped labels
attribution finds. Needs no network. The default is a ResNet on scikit-learn's 1,797 digits; `hf-trak demo text` trains a ModernBERT to tell
the topic of docstrings of Python's standard library.

With --model and --dataset: the same for a classification model and dataset of yours. The model is taken as trained and no label
is flipped, unless you say --train and --flip_fraction.

examples:
  hf-trak demo
  hf-trak demo text
  hf-trak demo --model my-bert --dataset train.parquet --queries validation.parquet --output my-demo
  hf-trak demo --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2 --train --flip_fraction 0.1 --max_rows 5000
"""


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([DemoArguments], command="demo", usage=_USAGE, description=_DESCRIPTION)
    (args,) = parse(parser, name_positions(arguments, ["data"]))
    return {"folder": _folder_of(args), **run(args)}


def run(args: DemoArguments) -> dict[str, Any]:
    """Run the demo and return what it wrote to `results.json`."""
    begin = time.perf_counter()
    _check(args)
    output = _begin_folder(args)

    import numpy as np

    from hf_trak.cli.demo_data import (
        digits,
        docstrings,
        featurize,
        flip_labels,
        n_threads,
        out_to_loss,
        own_data,
        train_and_featurize,
    )
    from hf_trak.cli.featurize import how_to_load
    from hf_trak.cli.main import quiet_libraries

    quiet_libraries()
    with n_threads(1 if args.model is None else None):
        data = own_data(args) if args.model else {"images": digits, "text": docstrings}[args.data](args.seed)
        true_labels = list(data.train[data.label_column])
        flipped = np.zeros(len(true_labels), dtype=bool)
        fraction = 0.1 if args.flip_fraction is None and args.model is None else args.flip_fraction or 0.0
        if fraction:
            data, flipped = flip_labels(data, fraction=fraction, seed=args.seed)
        say(f"{data.name}: {len(data.train):,} training rows, {len(data.queries):,} held-out rows.")
        if fraction:
            say(f"{flipped.sum():,} training labels ({fraction:.0%}) were flipped at random.")

        if args.model is None:
            data.train.to_parquet(output / "train.parquet")
            data.queries.to_parquet(output / "validation.parquet")
        index = (train_and_featurize if _trains(args) else featurize)(args, data, output / "run")
        hits = index.attribute(data.queries, top_k=5)
        scores = index.score(data.queries)
        rankings = {
            "self-influence": index.self_influence(),
            "opponents of held-out rows": -scores.mean(1, dtype=np.float64),
            "1 - p alone, no attribution": out_to_loss(index),
        }

    # The true labels were set aside until here: training and scoring never saw them.
    notes = {int(row): f"flipped, truly {data.label_name(true_labels[row])}" for row in np.flatnonzero(flipped)}
    show(args, data, index, hits, rankings["self-influence"], notes, output)
    results = results_of(args, data, index, rankings, flipped)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(output / "results.json", results)
    say(found_table(results) + f"\n{how_to_load(index.folder)}\n")
    say(f"Report: {output / 'report.html'} and {output / 'report.png'}\nNumbers: {output / 'results.json'}")
    say(f"It took {results['seconds']:.0f} s.\n{try_next(args, output)}")
    return results


def try_next(args: DemoArguments, output: Path) -> str:
    """Return commands that go on from here."""
    index, validation = output / "run" / "index", output / "validation.parquet"
    if args.model is not None:
        lines = [f"hf-trak push {index} me/my-index --private", "hf-trak featurize --help"]
    else:
        train = "" if args.data == "text" else f"--train {output / 'train.parquet'} "  # the index of texts has kept them
        lines = [
            f"hf-trak label-errors {index} {train}--validation {validation} --output suspicious.parquet",
            f"hf-trak attribute {index} {train}--queries {validation} --output hits.jsonl",
            *(["hf-trak demo text"] if args.data == "images" else []),
            "hf-trak demo --model MODEL --dataset TRAIN.csv --queries VALIDATION.csv",
        ]
    return "\n".join(["\nTry next:", *(f"    {line}" for line in lines)])


def _check(args: DemoArguments) -> None:
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, but is {args.seed}.")
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, but is {args.epochs}.")
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning_rate must be a number above 0, but is {args.learning_rate}.")
    if args.flip_fraction is not None and not 0 <= args.flip_fraction < 1:
        raise ValueError(f"--flip_fraction must be at least 0 and below 1, but is {args.flip_fraction}.")
    if (args.model is None) != (args.dataset is None):
        raise ValueError("--model and --dataset go together: give both for your own data, or neither for the demo's.")
    if args.model is not None and args.data != "images":
        raise ValueError("`hf-trak demo text` has data of its own; leave out `text` for your own --model and --dataset.")
    if args.model is None and (args.train or args.queries or args.processor):
        raise ValueError("--train, --queries and --processor are for your own --model and --dataset.")
    if args.model is not None and args.flip_fraction and not args.train:
        raise ValueError("Flipping labels changes nothing for a model that is already trained; add --train to fine-tune it.")
    if args.model is not None and not args.train and args.members != "final":
        raise ValueError("--members epoch:K are the last epochs of a training run; add --train, or leave it out.")
    if args.queries is None and args.dataset is not None and Path(args.dataset).is_file():
        raise ValueError(f"{args.dataset} is one file, so one split; name held-out rows with --queries.")


def _trains(args: DemoArguments) -> bool:
    return args.model is None or args.train


def _folder_of(args: DemoArguments) -> Path:
    return Path(args.output or ("hf_trak_demo_text" if args.data == "text" else "hf_trak_demo"))


def _begin_folder(args: DemoArguments) -> Path:
    """Make the output folder. Go on with an index of the same arguments; replace nothing that took its owner's time."""
    output = _folder_of(args)
    refuse_url(output)
    marker = output / _MARKER
    settings = {key: value for key, value in asdict(args).items() if key != "overwrite"}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not marker.is_file():
            raise ValueError(f"{output} holds something else than a demo; choose another --output.")
        earlier = read_json(marker)
        stopped_early = earlier.get("model") is None and not (output / "results.json").exists()
        if args.overwrite or stopped_early:
            _remove_earlier(output)
        elif _trains(args) or earlier != settings:
            raise ValueError(f"{output} holds an earlier demo; choose another --output, or pass --overwrite.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)
    return output


def _remove_earlier(output: Path) -> None:
    """Remove what an earlier demo wrote, but for its index, which the new one replaces, and for files of somebody else's."""
    members = output / "run" / "members"
    for path in (
        *(output / name for name in ("report.html", "report.png", "results.json", "train.parquet", "validation.parquet")),
        members / "run.json",
    ):
        remove_file(path)
    for snapshot in members.glob("*"):
        remove_snapshot(snapshot)
