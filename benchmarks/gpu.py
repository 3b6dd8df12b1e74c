"""Featurizing beside training on a GPU, and beside what the GPU can do at all: its bandwidth and its matrix products.

    python benchmarks/gpu.py --output results/gpu_featurize.json
    python benchmarks/gpu.py --device cpu --scale tiny --output tiny.json      # does it run?

BERT-base, ViT-B/16, GPT-2 (124M), a decoder of the shape of Llama-3.2-1B, and LoRA on that; random weights, random inputs. Each in float32,
in TF32 and under bfloat16 autocast. A training step is a plain forward and backward of the same batch, without its optimizer. Both passes
take turns, several rounds; a third pass, whose sketch does nothing, shows what the sketch takes. Where it is installed, fast_jl takes
its turns too. The answer is checked first, against the CPU's in float64. Each result is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from featurize import write
from torch import Tensor

from hf_trak.featurizing.devices import in_bfloat16
from hf_trak.gradients import layerwise_features, select_parameters
from hf_trak.projectors import Projector, make_projector
from hf_trak.projectors import count_sketch as ring
from hf_trak.tasks import AutoTask

SCALES: dict[str, dict[str, Any]] = {
    "real": {
        "bert": {"width": 768, "layers": 12, "rows": 64, "tokens": 128},
        "vit": {"width": 768, "layers": 12, "rows": 64, "tokens": 224},
        "gpt2": {"width": 768, "layers": 12, "rows": 16, "tokens": 512},
        "llama": {"width": 2048, "layers": 16, "rows": 8, "tokens": 1024},
        "lora": {"width": 2048, "layers": 16, "rows": 8, "tokens": 1024},
        "gradients": (16, 10_000_000),
        "side": 8192,
        "copied": 1 << 28,
    },
    "tiny": {
        **{name: {"width": 64, "layers": 2, "rows": 4, "tokens": 16} for name in ("bert", "gpt2", "llama", "lora")},
        "vit": {"width": 64, "layers": 2, "rows": 2, "tokens": 32},
        "gradients": (2, 50_000),
        "side": 256,
        "copied": 1 << 16,
    },
}
"""Width, layers, rows and tokens (of pictures: pixels of a side) of a batch; number and size of gradients; side of a square matrix;
entries copied."""
MODELS = ("bert", "vit", "gpt2", "llama", "lora")
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Work:
    """A model and a batch on the device."""

    case: str
    model: Any
    batch: dict[str, Tensor]
    output_function: Callable[..., Any]


class NoSketch(Projector):
    """Takes gradients and drops them: what is left of a pass is what the sketch does not take."""

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(batch_size, self.proj_dim, dtype=dtype, device=device)

    def finish(self, accumulator: Tensor) -> Tensor:
        return accumulator

    def add(self, accumulator: Tensor, name: str, grads: Tensor) -> None:
        del accumulator, name, grads

    def add_outer(self, accumulator: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        del accumulator, name, left, right

    def add_rows(self, accumulator: Tensor, name: str, shape: tuple[int, int], rows: Tensor, values: Tensor) -> None:
        del accumulator, name, shape, rows, values


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=list(SCALES), default="real")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip_ceilings", action="store_true", help="models alone: no bandwidth, products or single sketches")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one pass in the last precision")
    parser.add_argument("--output", type=Path, default=Path("results/gpu_featurize.json"))
    return parser.parse_args()


def load(name: str, options: argparse.Namespace) -> Work:
    torch.manual_seed(0)
    size = SCALES[options.scale][name]
    width, layers, rows, tokens = size["width"], size["layers"], size["rows"], size["tokens"]
    common: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers}
    batch: dict[str, Tensor]
    if name == "vit":
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                **common, num_attention_heads=width // 64, intermediate_size=4 * width, image_size=tokens, patch_size=16
            )
        )
        batch = {"pixel_values": torch.randn(rows, 3, tokens, tokens), "labels": torch.randint(2, (rows,))}
    else:
        if name == "bert":
            model = transformers.BertForSequenceClassification(
                transformers.BertConfig(**common, num_attention_heads=width // 64, intermediate_size=4 * width)
            )
        elif name == "gpt2":
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, bos_token_id=None, eos_token_id=None)
            )
        else:
            model = llama(width, layers, tiny=options.scale == "tiny", lora=name == "lora", device=options.device)
        ids = torch.randint(model.config.vocab_size, (rows, tokens))
        labels = torch.randint(2, (rows,)) if name == "bert" else ids.clone()
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6
    what = f"{rows} images of {tokens} × {tokens}" if name == "vit" else f"{rows} rows of {tokens} tokens"
    title = f"LoRA ({trained:.1f}M) on a Llama" if name == "lora" else type(model).__name__
    task = AutoTask.from_model(model)
    on_device = {key: value.to(options.device) for key, value in batch.items()}
    return Work(f"{title} {millions:.0f}M, {what}", model.to(options.device), on_device, task.output_function)


def llama(width: int, layers: int, *, tiny: bool, lora: bool, device: str) -> Any:
    """A decoder of the shape of Llama-3.2-1B."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=4 * width,
        vocab_size=512 if tiny else 128_256,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.device(device):  # a billion random numbers take a CPU half a minute
        model = transformers.LlamaForCausalLM(config)
    if not lora:
        return model
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)  # a fresh one is zero, and the gradients of its partner with it
    return adapted


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Let float32 products round to TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def train(work: Work, dtype: str) -> None:
    work.model.train()
    with torch.autocast(work.batch["labels"].device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = work.model(**work.batch).loss
    loss.backward()
    work.model.zero_grad(set_to_none=True)


def featurize(work: Work, projector: Projector, dtype: str) -> Tensor:
    function = work.output_function
    if dtype == "bfloat16":
        function = in_bfloat16(function, device_type=work.batch["labels"].device.type, vmapped=False)
    parameters = select_parameters(work.model).parameters
    work.model.eval()
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
    source = torch.randn(scale["copied"], device=options.device)
    target = torch.empty_like(source)
    seconds(target.copy_, source)
    times = [seconds(target.copy_, source) for _ in range(options.rounds)]
    yield row("ceilings", "copy", "bandwidth_gb_per_s", [2 * source.nbytes / 1e9 / one for one in times], "")
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(scale["side"], scale["side"], device=options.device, dtype=dtype)
        seconds(torch.mm, square, square)
        times = [seconds(torch.mm, square, square) for _ in range(options.rounds)]
        name = f"square product, {str(dtype).removeprefix('torch.')}"
        yield row("ceilings", name, "matmul_tflops", [2e-12 * len(square) ** 3 / one for one in times], "")


def sketch_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Gradients that are given whole: what reading them once would take is their bytes over the bandwidth above."""
    n_rows, size = SCALES[options.scale]["gradients"]
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
    if name not in ("bert", "gpt2"):
        chosen = dict(list(chosen.items())[:1])  # the others are slow, and two models show by how much
    elif name == "gpt2":
        chosen = {method: each for method, each in chosen.items() if "plain tensors" not in method or len(chosen) == 1}
    error = error_beside_the_cpu(work, next(iter(chosen.values()))[0], few=1 if name in ("llama", "lora") else 2)
    nothing = NoSketch(proj_dim=options.proj_dim, seed=0)
    n_rows = len(work.batch["labels"])
    for dtype in options.precisions:
        case = f"{work.case}, {dtype}, proj_dim {options.proj_dim}, 1 member"
        with precision(dtype):
            training_memory = peak_memory(train, work, dtype)
            times: dict[str, list[float]] = {method: [] for method in chosen}
            memory = {}
            for method, (projector, setting) in chosen.items():
                with setting:
                    memory[method] = peak_memory(featurize, work, projector, dtype)
            featurize(work, nothing, dtype)
            training, without = [], []
            for _ in range(options.rounds):
                training.append(seconds(train, work, dtype))
                without.append(seconds(featurize, work, nothing, dtype))
                for method, (projector, setting) in chosen.items():
                    with setting:
                        times[method].append(seconds(featurize, work, projector, dtype))
        for method, ours in times.items():
            ratios = [one / whole for one, whole in zip(ours, training, strict=True)]
            more = {"seconds_training": training, "seconds_featurizing": ours, "relative_error_to_cpu": error}
            yield row(case, method, "featurize_time_ratio", ratios, "x", **more)
            yield row(case, method, "featurize_rows_per_s", [n_rows / one for one in ours], "")
            shares = [1 - rest / one for rest, one in zip(without, ours, strict=True)]
            yield row(case, method, "sketch_share", shares, "share", seconds_without_sketch=without)
            if training_memory:
                peaks = {"training": training_memory, "featurizing": memory[method]}
                yield row(case, method, "featurize_memory_ratio", [memory[method] / training_memory], "x", peak_gb=peaks)
    if options.profile:
        profile(work, next(iter(chosen.values()))[0], options.precisions[-1])


def profile(work: Work, projector: Projector, dtype: str) -> None:
    """Print the kernels of one pass, by the time they take."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with precision(dtype), torch.profiler.profile(activities=activities) as found:
        featurize(work, projector, dtype)
        synchronize()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(
        f"{work.case}, {dtype}\n{found.key_averages().table(sort_by=order, row_limit=22, max_name_column_width=60)}", flush=True
    )


def error_beside_the_cpu(work: Work, projector: Projector, *, few: int) -> float:
    """Return the largest relative difference of some rows' features from the CPU's, in float64; stop where it is no round-off."""
    device = work.batch["labels"].device
    rows = {
        key: value[:few, :64] if key in ("input_ids", "attention_mask") else value[:few] for key, value in work.batch.items()
    }
    if work.batch["labels"].ndim == 2:
        rows["labels"] = rows["labels"][:, :64]
    model = work.model.double()
    features = []
    for where in (device, torch.device("cpu")):
        model.to(where)
        there = Work(work.case, model, {key: to(value, where) for key, value in rows.items()}, work.output_function)
        sketch = make_projector("block_count_sketch", proj_dim=projector.proj_dim, seed=0, fold=4)
        features.append(featurize(there, sketch, "float32").cpu())
    model.float().to(device)
    error = ((features[0] - features[1]).norm(dim=1) / features[1].norm(dim=1)).max().item()
    # Rotary positions are float32 in any dtype, and CUDA's cosines are not the CPU's.
    if not error < (1e-5 if hasattr(work.model.config, "rope_parameters") else 1e-9):
        raise SystemExit(f"Wrong answer: features on {device} differ from the CPU's by {error:.1e}.")
    return error


def to(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, torch.float64 if value.is_floating_point() else None)


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
    options.threads = torch.get_num_threads()
    sources: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = []
    if not options.skip_ceilings:
        sources += [("ceilings", lambda: ceilings(options)), ("sketch", lambda: sketch_rows(options))]
    sources += [(name, lambda name=name: featurize_rows(name, options)) for name in options.models]  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    failed = []
    for name, source in sources:
        try:
            for one in source():
                print(json.dumps(one), flush=True)
                rows.append(one)
                save(options, rows)
        except (RuntimeError, ValueError) as error:  # out of memory, say: the others are still worth their time
            failed.append(name)
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


def save(options: argparse.Namespace, rows: list[dict[str, Any]], *, command: str = "python benchmarks/gpu.py") -> None:
    write(options, rows, command=command)
    result = json.loads(options.output.read_text())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    result["hardware"] = {"device": name, "cuda": str(torch.version.cuda), "machine": platform.machine()}
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
