"""What a new user waits for: each step of README and guides in an empty environment, timed, with a model and CSV files of one's own.

    python benchmarks/newcomer.py --model my-bert --train train.csv --validation validation.csv --work /scratch/newcomer

`--model` is a text classifier with its tokenizer, and the files have columns text and label. The Hub is one in memory, on a loopback port,
so that no account is needed; what it is loaded from has another cache and another working folder. CPU seconds are those of the commands, and do
not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from featurize import write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hub_server import TOKEN, HubServer  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "newcomer_cpu.json")
    return parser.parse_args()


def cpu_seconds() -> float:
    """Return the CPU seconds of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = parse()
    work = options.work.resolve()
    work.mkdir(parents=True)
    programs = work / "environment" / "bin"
    model, train, validation = (str(path.resolve()) for path in (options.model, options.train, options.validation))
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "VIRTUAL_ENV"))}
    plain |= {"OMP_NUM_THREADS": str(options.threads), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HOME": str(work / "cache")}

    def run(*command: str, environment: dict[str, str] | None = None, folder: Path = work) -> str:
        program = str(programs / command[0]) if (programs / command[0]).exists() else command[0]
        done = subprocess.run(
            [program, *command[1:]], cwd=folder, env=environment or plain, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout

    def install() -> None:
        run(sys.executable, "-m", "venv", str(work / "environment"))
        run("pip", "install", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[demo,explore]")

    def explain() -> None:
        columns = ["--keep_columns", "text,label"]
        run("hf-trak", "featurize", "--model", model, "--dataset", train, "--output", "my-index", *columns)
        assert "Query" in run("hf-trak", "explain", "my-index", "--text", "a gripping film, from the first scene to the last")

    def label_errors() -> None:
        run("hf-trak", "label-errors", "my-index", "--validation", validation, "--output", "suspicious.parquet")

    def explore() -> None:
        command = [str(programs / "hf-trak"), "explore", "my-index", "--validation", validation, "--no_browser", "--json"]
        with subprocess.Popen(
            command, cwd=work, env=plain, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as page:
            try:
                assert page.stdout is not None
                address = json.loads(page.stdout.readline())["result"]["address"]
                assert urllib.request.urlopen(address, timeout=60).status == 200
            finally:
                page.terminate()

    def share() -> None:
        with HubServer() as hub:
            ours = {**plain, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            run("hf-trak", "push", "my-index", "alice/my-index", "--license", "mit", environment=ours)
            theirs, elsewhere = {**ours, "HF_HOME": str(work / "their-cache")}, work / "elsewhere"
            elsewhere.mkdir()
            asked = ["--queries", validation, "--model", model, "--output", "hits.jsonl"]
            run("hf-trak", "attribute", "alice/my-index", *asked, environment=theirs, folder=elsewhere)

    steps: dict[str, Callable[[], object]] = {
        "install from a checkout, with demo and explore": install,
        "hf-trak demo": lambda: run("hf-trak", "demo"),
        "hf-trak demo text": lambda: run("hf-trak", "demo", "text"),
        "explain a prediction of one's own model, index included": explain,
        "label errors in one's own CSV": label_errors,
        "explore: until the page is served": explore,
        "push to a Hub, load and ask elsewhere": share,
    }
    rows = []
    for name, step in steps.items():
        begin, used = time.perf_counter(), cpu_seconds()
        step()
        measured = {"newcomer_s": time.perf_counter() - begin, "newcomer_cpu_s": cpu_seconds() - used}
        print(f"{measured['newcomer_s']:8.1f} s, {measured['newcomer_cpu_s']:.1f} of CPU  {name}", flush=True)
        rows += [
            {"case": "an empty environment", "method": name, "metric": metric, "value": value, "unit": "s", "interval": None}
            for metric, value in measured.items()
        ]
    print(f"Load of the machine: {os.getloadavg()}")
    write(
        options, rows, command="python benchmarks/newcomer.py --model MODEL --train TRAIN --validation VALIDATION --work FOLDER"
    )


if __name__ == "__main__":
    main()
