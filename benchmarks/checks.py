"""What the checks of a run cost: a training set featurized as a user does it, with a timer around each check.

    python benchmarks/checks.py --model bert --dataset sst2.parquet --rows 10000
    python benchmarks/checks.py --model bert --dataset sst2.parquet --before ../older --rounds 3     # another tree of hf_trak, too

Each run is `hf-trak featurize` in a new process. CPU seconds are those of the whole process, from its start to its end. A check is what
a run does for no other end than to know that its rows are right: a share is its CPU seconds over those of the run. With `--before`, runs
of the two trees go side by side, and the ratio of their CPU seconds is taken round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

CHECKS = {
    "weights, configuration and files of the checkpoint": [
        ("hf_trak.building.build", "check_is_checkpoint"),
        ("hf_trak.sources.weights", "check_files"),
        ("hf_trak.sources.weights", "check_weights"),
        ("hf_trak.featurizing.featurizer", "check_vocabulary"),
        ("hf_trak.featurizing.featurizer", "check_dtype"),
        ("hf_trak.sources.processors", "_check_settings"),
        ("hf_trak.sources.processors", "_check_files"),
        ("hf_trak.sources.processors", "_check_content"),
        ("hf_trak.building.build", "check_whole"),
    ],
    "columns, labels and rows, some read several times": [
        ("hf_trak.tasks.base", "Task.reading"),
        ("hf_trak.tasks.base", "Task.check"),
    ],
    "first rows of a language model": [("hf_trak.featurizing.featurizer", "Featurizer.check_first_rows")],
    "digests of the rows": [
        ("hf_trak.building.checks", "TrainingRows.of"),
        ("hf_trak.building.checks", "TrainingRows.identity"),
        ("hf_trak.building.checks", "TrainingRows.digest_column"),
    ],
    "hashes of weights, tokenizer and settings": [
        ("hf_trak.featurizing.checkpoint_model", "CheckpointModel.hash"),
        ("hf_trak.building.passes", "describe_featurizer"),
    ],
    "gradients of three rows, alone and together": [("hf_trak.featurizing.featurizer", "Featurizer.choose_engine")],
    "numbers that are not finite": [
        ("hf_trak.featurizing.featurizer", "not_finite"),
        ("hf_trak.featurizing.featurizer", "check_finite"),
    ],
    "caches that modules keep, forgotten": [
        ("hf_trak.gradients.batch", "forget_caches"),
        ("hf_trak.gradients.layerwise", "forget_caches"),
    ],
    "hashes of the files that were written": [
        ("hf_trak.storage.writer", "hash_file"),
        ("hf_trak.storage.verify", "hash_file"),
        ("hf_trak.storage.writer", "check_shard"),
        ("hf_trak.storage.writer", "check_place"),
    ],
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a classifier and its tokenizer")
    parser.add_argument("--dataset", required=True, help="a Parquet file with a text and a label column")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--before", type=Path, help="another tree of hf_trak, timed as a whole")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/checks_cpu.json"))
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


class Timers:
    """CPU seconds of this process's threads within functions, by group; what runs inside another one of them counts with the outer."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CHECKS, 0.0)
        self.inside = threading.local()

    def place(self) -> None:
        """Put a timer around each function that is there.

        Raises:
            SystemExit: If one is not, since its cost would be left out.
        """
        for group, functions in CHECKS.items():
            for module, name in functions:
                owner, attribute = importlib.import_module(module), name
                if "." in name:
                    owner, attribute = getattr(owner, name.split(".")[0]), name.split(".")[1]
                if attribute not in vars(owner):
                    raise SystemExit(f"{module}.{name} is not there; mend the table of checks.")
                found = vars(owner)[attribute]
                plain = found.__func__ if isinstance(found, classmethod) else found
                timed = self._timed(plain, group)
                setattr(owner, attribute, classmethod(timed) if isinstance(found, classmethod) else timed)

    def _timed(self, function: Callable[..., Any], group: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(self.inside, "a_check", False):
                return function(*arguments, **options)
            self.inside.a_check = True
            begin = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[group] += time.thread_time() - begin
                self.inside.a_check = False

        return timed


def child(arguments: list[str]) -> None:
    """Run a command with the timers, and print what they say."""
    from hf_trak.cli.main import main as run

    importlib.import_module("hf_trak.index")
    timers = Timers()
    timers.place()
    with contextlib.redirect_stdout(sys.stderr):
        status = run(arguments)
    if status:
        raise SystemExit(status)
    print(json.dumps(timers.seconds))


def start(command: list[str], tree: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> tuple[float, bytes]:
    """Return the CPU seconds of a process, and what it printed."""
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}.")
    return usage.ru_utime + usage.ru_stime, printed


def describe(model: str) -> str:
    """Return a classifier's class and size."""
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    return f"{type(loaded).__name__} of {loaded.num_parameters() / 1e6:.0f}M parameters"


def main() -> None:
    options = parse()
    if options.child is not None:
        child(options.child)
        return
    here = Path(__file__).resolve().parents[1]
    features = ["featurize", "--model", options.model, "--dataset", options.dataset, "--max_rows", str(options.rows)]
    shares: dict[str, list[float]] = {group: [] for group in CHECKS}
    ratios, totals = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            timed = [
                sys.executable,
                __file__,
                "--model",
                "",
                "--dataset",
                "",
                "--child",
                *features,
                "--output",
                f"{folder}/now",
            ]
            now = start(timed, here, options.threads)
            if options.before is not None:
                plain = [sys.executable, "-m", "hf_trak.cli.main", *features, "--output", f"{folder}/before"]
                before, _ = finish(start(plain, options.before.resolve(), options.threads))
            total, printed = finish(now)
        totals.append(total)
        for group, seconds in json.loads(printed.splitlines()[-1]).items():
            shares[group].append(seconds / total)
        if options.before is not None:
            ratios.append(total / before)
        print(
            json.dumps({"total": total, **{group: values[-1] for group, values in shares.items()}, "ratios": ratios}),
            flush=True,
        )
    case = f"{describe(options.model)}, {options.rows:,} rows, proj_dim 4096, 1 member"
    rows = [_row(case, group, "check_cpu_share", values) for group, values in shares.items()]
    rows.append(_row(case, "all of them", "check_cpu_share", [sum(parts) for parts in zip(*shares.values(), strict=True)]))
    rows.append(_row(case, "the run", "run_cpu_s", totals, unit="CPU s"))
    if ratios:
        rows.append(_row(case, f"the run, over that of {options.before.name}", "run_cpu_ratio", ratios, unit="x"))
    from featurize import write

    write(options, rows, command="python benchmarks/checks.py --model bert --dataset sst2.parquet")


def _row(case: str, method: str, metric: str, values: list[float], unit: str = "share") -> dict[str, Any]:
    middle = statistics.median(values)
    spread = [min(values), max(values)] if len(values) > 1 else None
    return {"case": case, "method": method, "metric": metric, "value": middle, "unit": unit, "interval": spread}


if __name__ == "__main__":
    main()
