"""How long the explorer takes to load an index, and to answer, over HTTP as its page asks.

    hf-trak featurize --model bert --dataset sst2.parquet --max_rows 20000 --keep_columns sentence,label --output my-index
    python benchmarks/explorer.py --index my-index --validation validation.parquet --output results/explorer_cpu.json

Each question is asked several times, of different rows; the value is the median, the interval the fastest and the slowest. CPU seconds are those
of the explorer and of what asks it, and do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from featurize import write

from hf_trak import AttributionIndex
from hf_trak.cli.data import load_rows
from hf_trak.explorer.app import serve
from hf_trak.explorer.views import Explorer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/explorer_cpu.json"))
    return parser.parse_args()


def seconds(call: Callable[[int], str], rounds: int) -> dict[str, list[float]]:
    """Return how long each call takes, by the clock and by the processor.

    Raises:
        ValueError: If an answer is an error.
    """
    found: dict[str, list[float]] = {"explorer_s": [], "explorer_cpu_s": []}
    for number in range(rounds):
        begin, used = time.perf_counter(), time.process_time()
        said = call(number)
        found["explorer_s"].append(time.perf_counter() - begin)
        found["explorer_cpu_s"].append(time.process_time() - used)
        if 'role="alert"' in str(said):
            raise ValueError(f"The explorer says: {said}")
    return found


def main() -> None:
    options = parse()
    begin, used = time.perf_counter(), time.process_time()
    index = AttributionIndex.from_pretrained(options.index)
    explorer = Explorer(index, validation=load_rows(options.validation, split=options.split))
    loaded = {"explorer_s": [time.perf_counter() - begin], "explorer_cpu_s": [time.process_time() - used]}
    from gradio_client import Client

    with tempfile.TemporaryDirectory() as export, serve(explorer, export) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        rest = ("pair", 5, None, "", "", "", False, "a gripping film that never lets go")

        def ask(n: int) -> str:
            return str(client.predict("validation", n, "prediction", "(nothing)", *rest, api_name="/ask"))

        questions: dict[str, tuple[Callable[[int], str], int]] = {
            "the first answer": (ask, 1),
            "a validation row": (lambda n: ask(n + 1), options.rounds),
            "a training row, a class against the other": (
                lambda n: client.predict(
                    "training", n, explorer.classes[n % 2], explorer.classes[1 - n % 2], *rest, api_name="/ask"
                ),
                options.rounds,
            ),
            "a typed text": (
                lambda n: client.predict("text", 0, explorer.classes[n % 2], "(nothing)", *rest, api_name="/ask"),
                options.rounds,
            ),
            "rows that help and harm 100 validation rows": (
                lambda n: client.predict("validation", 100, "label", 6, api_name="/influence"),
                3,
            ),
            "label errors, the first time": (lambda n: str(client.predict(api_name="/find_label_errors")), 1),
            "label errors, the next row": (lambda n: str(client.predict(api_name="/next")), options.rounds),
        }
        timed = {"loading": loaded, **{name: seconds(*question) for name, question in questions.items()}}
    model = index.members[0].identity["model_class"]
    case = f"{model}, {index.n_rows:,} rows, {len(index.members)} member, proj_dim {index.config.proj_dim:,}"
    rows = []
    for name, measured in timed.items():
        for metric, found in measured.items():
            spread = [min(found), max(found)] if len(found) > 1 else None
            value = statistics.median(found)
            rows.append({"case": case, "method": name, "metric": metric, "value": value, "unit": "s", "interval": spread})
            print(f"{value:8.2f} s  {name}, {metric}", flush=True)
    print(f"Load of the machine: {os.getloadavg()}")
    write(options, rows, command="python benchmarks/explorer.py --index INDEX --validation VALIDATION")


if __name__ == "__main__":
    main()
