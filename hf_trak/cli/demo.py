"""`hf-trak demo`: from data to attributions in about a minute, with labels flipped on purpose and found again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_trak.cli.demo_arguments import DemoArguments
from hf_trak.cli.parsing import make_parser, parse
from hf_trak.storage.files import read_json, remove_file, write_json
from hf_trak.storage.snapshots import remove_snapshot

_MARKER = ".hf_trak_demo.json"
_USAGE = "[--output FOLDER] [options]"
_DESCRIPTION = """\
Without arguments: train a small ResNet on scikit-learn's 1,797 real digits after flipping 10 % of the training labels, featurize,
attribute held-out digits, and count how many flipped labels attribution finds. Needs no network.

With --model and --dataset: the same for a classification model and dataset of yours. The model is taken as trained and no label
is flipped, unless you say --train and --flip_fraction.

examples:
  hf-trak demo
  hf-trak demo --model my-bert --dataset train.parquet --queries validation.parquet --output my-demo
  hf-trak demo --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2 --train --flip_fraction 0.1 --max_rows 5000
"""


def main(arguments: Sequence[str]) -> None:
    """Parse and run."""
    parser = make_parser([DemoArguments], command="demo", usage=_USAGE, description=_DESCRIPTION)
    run(*parse(parser, arguments))


def run(args: DemoArguments) -> dict[str, Any]:
    """Run the demo and return what it wrote to `results.json`."""
    begin = time.perf_counter()
    _check(args)
    output = _begin_folder(args)

    import numpy as np

    from hf_trak.cli.demo_data import digits, flip_labels, own_data
    from hf_trak.cli.demo_features import featurize, n_threads, out_to_loss, train_and_featurize
    from hf_trak.cli.demo_results import found_table, results_of, show
    from hf_trak.cli.featurize import how_to_load
    from hf_trak.cli.quiet import hush

    hush()
    with n_threads(1 if args.model is None else None):
        data = digits(args.seed) if args.model is None else own_data(args)
        true_labels = list(data.train[data.label_column])
        flipped = np.zeros(len(true_labels), dtype=bool)
        fraction = 0.1 if args.flip_fraction is None and args.model is None else args.flip_fraction or 0.0
        if fraction:
            data, flipped = flip_labels(data, fraction=fraction, seed=args.seed)
        print(f"{data.name}: {len(data.train):,} training rows, {len(data.queries):,} held-out rows.")
        if fraction:
            print(f"{flipped.sum():,} training labels ({fraction:.0%}) were flipped at random.")

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
    show(args, data, hits, rankings["self-influence"], notes, output)
    results = results_of(args, data, index, rankings, flipped)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(output / "results.json", results)
    print(found_table(results) + f"\n{how_to_load(index.folder)}\n")
    print(f"Report: {output / 'report.html'} and {output / 'report.png'}\nNumbers: {output / 'results.json'}")
    print(f"It took {results['seconds']:.0f} s.")
    return results


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
        raise ValueError("--model and --dataset go together: give both for your own data, or neither for the digits.")
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


def _begin_folder(args: DemoArguments) -> Path:
    """Make the output folder. Go on with an index of the same arguments; replace nothing that took its owner's time."""
    output, marker = Path(args.output), Path(args.output) / _MARKER
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
    for path in (*(output / name for name in ("report.html", "report.png", "results.json")), members / "run.json"):
        remove_file(path)
    for snapshot in members.glob("*"):
        remove_snapshot(snapshot)
