"""What `torch.compile` could save: a plain forward and backward pass, compiled and not, on the workloads of `featurize.py`.

    python benchmarks/compile.py --dataset qnli.parquet --output results/compile_cpu.json

Featurizing makes the same forward pass and the same backward pass to activations, so what compiling saves there bounds what it could
save here; the hooks that watch every layer break the graph at every layer. Batches are of many lengths, as they are when featurizing:
shapes are marked dynamic, and compiling is not counted but reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from featurize import cpu_seconds, write
from torch import nn
from workloads import NAMES, Workload, load_workload


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=["bert", "decoder"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/compile_cpu.json"))
    return parser.parse_args()


def pass_over(workload: Workload, model: nn.Module) -> None:
    """Forward, and backward to every weight, in eval mode as featurizing has it."""
    for batch in workload.batches:
        workload.output_function(model, batch)[0].sum().backward()
        model.zero_grad()


def rows_of(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    model = workload.model.eval()
    compiled = torch.compile(model, dynamic=True)
    begin = time.perf_counter()
    pass_over(workload, compiled)
    compiling = time.perf_counter() - begin
    pass_over(workload, model)
    ratios = []
    for _ in range(rounds):
        plain = cpu_seconds(pass_over, workload, model)
        ratios.append(cpu_seconds(pass_over, workload, compiled) / plain)
    common = {"case": workload.case, "method": "torch.compile, dynamic shapes"}
    return [
        {
            **common,
            "metric": "compiled_cpu_ratio",
            "value": statistics.median(ratios),
            "unit": "x",
            "interval": [min(ratios), max(ratios)],
        },
        {**common, "metric": "compile_s", "value": compiling, "unit": "s", "interval": None},
    ]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.workloads:
        workload = load_workload(name, dataset=options.dataset, rows=options.rows, batch_size=options.batch_size)
        rows += rows_of(workload, options.rounds)
        print(json.dumps(rows[-2:]), flush=True)
    write(options, rows, command="python benchmarks/compile.py")


if __name__ == "__main__":
    main()
