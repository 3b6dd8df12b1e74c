"""The float32 products of a pass by oneDNN and by torch's usual library, MKL, in turn.

    python benchmarks/products.py --output results/products_cpu.json

Shapes are those of a decoder layer of width 512 on 16 rows of 128 tokens, forward, backward and an example's outer product. Both answers
are held against float64 first. What `hf_trak/matmul.py` chooses on this machine is printed, and changes nothing here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from featurize import write
from torch import Tensor

from hf_trak.matmul import linear, onednn_is_faster

Function = Callable[[Tensor, Tensor], Tensor]
METHODS: dict[str, Function] = {"oneDNN": linear, "torch.nn.functional.linear": F.linear}
CALLS = 10


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs, grads, weight = torch.randn(2048, 512), torch.randn(2048, 2048), torch.randn(2048, 512)
    left, right = torch.randn(128, 512), torch.randn(128, 512)
    return {
        "forward, 2048 × 512 times 512 × 2048": (inputs, weight),
        "backward, 2048 × 2048 times 2048 × 512": (grads, weight.T),
        "outer product of one example, 512 × 128 times 128 × 512": (left.T, right.T),
    }


def cpu_seconds(function: Function, inputs: Tensor, weight: Tensor) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        function(inputs, weight)
    return (time.process_time() - start) / CALLS


def rows_of(case: str, inputs: Tensor, weight: Tensor, rounds: int) -> list[dict[str, Any]]:
    exact = inputs.double() @ weight.double().T
    errors = {name: ((function(inputs, weight) - exact).norm() / exact.norm()).item() for name, function in METHODS.items()}
    if not max(errors.values()) < 1e-5:
        raise SystemExit(f"Wrong answer in {case!r}: relative errors to float64 are {errors}.")
    times = [{name: cpu_seconds(function, inputs, weight) for name, function in METHODS.items()} for _ in range(rounds)]
    rows = []
    for name in METHODS:
        gflops = [2e-9 * inputs.numel() * len(weight) / one[name] for one in times]
        rows.append(
            {
                "case": case,
                "method": name,
                "relative_error_to_float64": errors[name],
                "metric": "gflops_per_cpu_s",
                "value": statistics.median(gflops),
                "unit": "",
                "interval": [min(gflops), max(gflops)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/products_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"hf_trak multiplies by {'oneDNN' if onednn_is_faster() else 'MKL'} here.")
    rows = [row for case, operands in cases().items() for row in rows_of(case, *operands, options.rounds)]
    for row in rows:
        print(json.dumps(row))
    write(options, rows, command="python benchmarks/products.py")


if __name__ == "__main__":
    main()
