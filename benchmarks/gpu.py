"""Featurizing beside training on a GPU, and beside what the GPU can do at all: its bandwidth and its matrix products.

    python benchmarks/gpu.py --output results/gpu_featurize.json
    python benchmarks/gpu.py --device cpu --scale tiny --output tiny.json      # does it run?

A BERT-base and a decoder of 355M, random weights, random tokens, in float32 and under bfloat16 autocast. Every projector that is installed
takes turns with a plain forward and backward of the same batches: the block count sketch with and without its Triton kernels, and fast_jl.
The answer is checked first, against the CPU's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from featurize import write
from torch import Tensor

from hf_trak.featurizing.autocast import in_bfloat16
from hf_trak.gradients import layerwise_features, select_parameters
from hf_trak.projectors import Projector, make_projector, ring
from hf_trak.tasks import AutoTask

SCALES = {
    "real": {
        "bert": (768, 12, 32, 128),
        "decoder": (1024, 24, 8, 512),
        "gradients": (16, 10_000_000),
        "side": 8192,
        "copied": 1 << 28,
    },
    "tiny": {"bert": (64, 2, 4, 16), "decoder": (64, 2, 4, 16), "gradients": (2, 50_000), "side": 256, "copied": 1 << 16},
}
"""Width, layers, rows and tokens of a batch; number and size of gradients; side of a square matrix; entries copied."""


@dataclass(frozen=True)
class Work:
    """A model and a batch on the device."""

    case: str
    model: transformers.PreTrainedModel
    batch: dict[str, Tensor]
    output_function: Callable[..., Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=list(SCALES), default="real")
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("results/gpu_featurize.json"))
    return parser.parse_args()


def load(name: str, options: argparse.Namespace) -> Work:
    torch.manual_seed(0)
    width, layers, rows, tokens = SCALES[options.scale][name]  # type: ignore[misc]
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
        )
        model = transformers.BertForSequenceClassification(config)
        labels = torch.randint(config.num_labels, (rows,))
    else:
        config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=None, eos_token_id=None)
        model = transformers.GPT2LMHeadModel(config)
        labels = None
    ids = torch.randint(config.vocab_size, (rows, tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone() if labels is None else labels}
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    case = f"{type(model).__name__} {size:.0f}M, {rows} rows of {tokens} tokens"
    output_function = AutoTask.from_model(model).output_function
    on_device = {key: value.to(options.device) for key, value in batch.items()}
    return Work(case, model.to(options.device), on_device, output_function)


def train(work: Work, dtype: str) -> None:
    work.model.train()
    with torch.autocast(work.model.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = work.model(**work.batch).loss
    loss.backward()
    work.model.zero_grad(set_to_none=True)


def featurize(work: Work, projector: Projector, dtype: str) -> Tensor:
    function = work.output_function
    if dtype == "bfloat16":
        function = in_bfloat16(function, device_type=work.model.device.type, vmapped=False)
    parameters = select_parameters(work.model).parameters
    return layerwise_features(
        work.model, work.batch, output_function=function, parameters=parameters, projector=projector
    ).features


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Time one call, from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    run(*arguments)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(case: str, method: str, metric: str, values: list[float], unit: str, **more: Any) -> dict[str, Any]:
    interval = [min(values), max(values)] if len(values) > 1 else None
    return {
        "case": case,
        "method": method,
        **more,
        "metric": metric,
        "value": statistics.median(values),
        "unit": unit,
        "interval": interval,
    }


def projectors(options: argparse.Namespace) -> dict[str, tuple[Projector, AbstractContextManager[Any]]]:
    """Return every sketch to be timed, and what has to be in force meanwhile."""
    sketch = make_projector("block_count_sketch", proj_dim=options.proj_dim, seed=0, fold=4)
    found: dict[str, tuple[Projector, AbstractContextManager[Any]]] = {}
    if ring.kernels_for(torch.device(options.device)) is not None:
        found["hf_trak block_count_sketch, Triton"] = (sketch, nullcontext())
    found["hf_trak block_count_sketch, plain tensors"] = (sketch, patch.object(ring, "kernels_for", lambda device: None))
    try:
        fast_jl = make_projector("fast_jl", proj_dim=options.proj_dim, seed=0)
        fast_jl.tied_to(torch.device(options.device))  # type: ignore[attr-defined]
        found["hf_trak fast_jl"] = (fast_jl, nullcontext())
    except (ImportError, ValueError) as error:
        print(f"fast_jl is not measured: {error}", flush=True)
    return found


def ceilings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    scale = SCALES[options.scale]
    source = torch.randn(scale["copied"], device=options.device)  # type: ignore[arg-type]
    target = torch.empty_like(source)
    seconds(target.copy_, source)
    times = [seconds(target.copy_, source) for _ in range(options.rounds)]
    yield row("ceilings", "copy", "bandwidth_gb_per_s", [2 * source.nbytes / 1e9 / one for one in times], "")
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(scale["side"], scale["side"], device=options.device, dtype=dtype)  # type: ignore[call-overload]
        seconds(torch.mm, square, square)
        times = [seconds(torch.mm, square, square) for _ in range(options.rounds)]
        name = f"square product, {str(dtype).removeprefix('torch.')}"
        yield row("ceilings", name, "matmul_tflops", [2e-12 * len(square) ** 3 / one for one in times], "")


def sketch_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Gradients that are given whole: what reading them once would take is their bytes over the bandwidth above."""
    n_rows, size = SCALES[options.scale]["gradients"]  # type: ignore[misc]
    width = 2048
    gradients = torch.randn(n_rows, size // width, width, device=options.device)
    for method, (projector, setting) in projectors(options).items():

        def sketch(projector: Projector = projector) -> None:
            accumulator = projector.start(n_rows, dtype=torch.float32, device=gradients.device)
            projector.add(accumulator, "weight", gradients)
            projector.finish(accumulator)

        with setting:
            seconds(sketch)
            times = [seconds(sketch) for _ in range(options.rounds)]
        case = f"{n_rows} gradients of {size / 1e6:g}M parameters, given whole, proj_dim {options.proj_dim}"
        yield row(case, method, "sketch_gb_per_s", [gradients.nbytes / 1e9 / one for one in times], "")


def featurize_rows(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    work = load(name, options)
    chosen = projectors(options)
    error = error_beside_the_cpu(work, next(iter(chosen.values()))[0])
    for dtype in ("float32", "bfloat16"):
        case = f"{work.case}, {dtype}, proj_dim {options.proj_dim}, 1 member"
        training_memory = peak_memory(train, work, dtype)
        times: dict[str, list[float]] = {method: [] for method in chosen}
        memory = {}
        for method, (projector, setting) in chosen.items():
            with setting:
                memory[method] = peak_memory(featurize, work, projector, dtype)
        training = []
        for _ in range(options.rounds):
            training.append(seconds(train, work, dtype))
            for method, (projector, setting) in chosen.items():
                with setting:
                    times[method].append(seconds(featurize, work, projector, dtype))
        for method, ours in times.items():
            ratios = [one / whole for one, whole in zip(ours, training, strict=True)]
            more = {"seconds_training": training, "seconds_featurizing": ours, "relative_error_to_cpu": error}
            yield row(case, method, "featurize_time_ratio", ratios, "x", **more)
            if training_memory:
                peaks = {"training": training_memory, "featurizing": memory[method]}
                yield row(case, method, "featurize_memory_ratio", [memory[method] / training_memory], "x", peak_gb=peaks)


def error_beside_the_cpu(work: Work, projector: Projector) -> float:
    """Return the largest relative difference of two rows' features from the CPU's, in float64; stop where it is no round-off."""
    few = {key: value[:2].cpu() for key, value in work.batch.items()}
    device = work.model.device
    model = work.model.double()
    features = []
    for where in (device, torch.device("cpu")):
        model.to(where)
        there = Work(work.case, model, {key: value.to(where) for key, value in few.items()}, work.output_function)
        features.append(
            featurize(there, make_projector("block_count_sketch", proj_dim=projector.proj_dim, seed=0, fold=4), "float32").cpu()
        )
    model.float().to(device)
    error = ((features[0] - features[1]).norm(dim=1) / features[1].norm(dim=1)).max().item()
    if not error < 1e-9:
        raise SystemExit(f"Wrong answer: features on {device} differ from the CPU's by {error:.1e}.")
    return error


def peak_memory(run: Callable[..., Any], *arguments: Any) -> float:
    """Run once, which also warms up, and return the most memory it took, in GB; 0 where that is not known."""
    if not torch.cuda.is_available():
        run(*arguments)
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def main() -> None:
    options = parse()
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. To see whether the benchmark runs: --device cpu --scale tiny")
    rows = []
    sources = (ceilings(options), sketch_rows(options), *(featurize_rows(name, options) for name in ("bert", "decoder")))
    for source in sources:
        for one in source:
            print(json.dumps(one), flush=True)
            rows.append(one)
    options.threads = torch.get_num_threads()
    write(options, rows, command="python benchmarks/gpu.py")
    result = json.loads(options.output.read_text())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    result["hardware"] = {"device": name, "cuda": str(torch.version.cuda), "machine": platform.machine()}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
