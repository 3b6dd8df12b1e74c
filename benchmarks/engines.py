"""What each gradient engine costs: CPU time and memory over a plain forward and backward pass of the same rows.

    python benchmarks/engines.py                # results/engines_cpu.json; about two CPU-minutes on one thread

Four shapes with random weights: DeBERTa-v3-small (with a vocabulary of 8,192), a mixture of experts as Mixtral has it, Mamba, and ViT-Ti/16.
Each engine runs in a separate process. It featurizes the rows as `Featurizer` does, including collation, in turns with plain passes, and the ratio
is taken round by round. The loop is also compared with training passes over single rows, and with the cost that `gradients="auto"` would log.
The features of each engine are first checked against float64 autograd over single rows. Peak memory is measured in a separate process for each
method, and excludes what the process used before the model was made.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from datasets import Dataset

from hf_trak import TrakConfig
from hf_trak.featurizing.engine_choice import cost_of_loop
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients import CheckFailed
from hf_trak.gradients.batch import evaluation_mode

ENGINES = ("layerwise", "functional", "loop")
PLAIN, ONE_BY_ONE = "forward and backward pass, batched", "forward and backward passes, one row at a time"
VOCABULARY, CHECKED_ROWS, TOLERANCE = 8192, 2, 1e-4


@dataclass(frozen=True)
class Shape:
    """A model's class, configuration and rows."""

    model: str
    config: Any
    lengths: tuple[int, int] | None  # of the rows, least and most; None for images
    n_classes: int | None = 2

    def make(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, self.model)(self.config).eval()

    def rows(self, n_rows: int) -> Dataset:
        generator = np.random.default_rng(0)
        columns: dict[str, Any] = {}
        if self.lengths is None:
            size = self.config.image_size
            columns["pixel_values"] = generator.normal(size=(n_rows, 3, size, size)).astype(np.float32).tolist()
        else:
            lengths = generator.integers(*self.lengths, endpoint=True, size=n_rows)
            columns["input_ids"] = [generator.integers(5, VOCABULARY, size=length).tolist() for length in lengths]
        if self.n_classes is not None:
            columns["label"] = generator.integers(0, self.n_classes, n_rows).tolist()
        return Dataset.from_dict(columns)

    def case(self, name: str, model: torch.nn.Module, n_rows: int) -> str:
        n_parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        rows = "images" if self.lengths is None else f"rows of {self.lengths[0]} to {self.lengths[1]} tokens"
        return f"{name} {n_parameters:.0f}M, {n_rows} {rows} in one batch"


def shapes() -> dict[str, Shape]:
    deberta = transformers.DebertaV2Config(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072, type_vocab_size=0,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, max_position_embeddings=512, max_relative_positions=-1,
    )  # fmt: skip
    mixtral = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    mamba = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, state_size=16)
    vit = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=224, num_labels=10
    )
    return {
        "DeBERTa-v3-small": Shape("DebertaV2ForSequenceClassification", deberta, (16, 32)),
        "Mixtral": Shape("MixtralForCausalLM", mixtral, (16, 32), None),
        "Mamba": Shape("MambaForCausalLM", mamba, (16, 32), None),
        "ViT-Ti/16": Shape("ViTForImageClassification", vit, None, 10),
    }


class Case:
    """A model, its rows, and what is run on them."""

    def __init__(self, shape: Shape, *, n_rows: int, proj_dim: int) -> None:
        self.model, self.rows, self.proj_dim = shape.make(), shape.rows(n_rows), proj_dim
        self.plain_side = self.featurizer("loop")
        self.batch = self.plain_side.collate(self.rows[:])
        self.alone = [self.plain_side.collate(self.rows[row : row + 1]) for row in range(n_rows)]

    def featurizer(self, engine: str) -> Featurizer:
        featurizer = Featurizer(self.model, TrakConfig(proj_dim=self.proj_dim, gradients=engine), device="cpu")  # type: ignore[arg-type]
        featurizer.check(self.rows)
        featurizer.choose_engine(self.rows)
        return featurizer

    def train(self, batches: list[Any]) -> None:
        """Make the gradients that a training step would."""
        with evaluation_mode(self.model), torch.enable_grad():
            self.model.requires_grad_(True)
            for batch in batches:
                output, _ = self.plain_side.task.output_function(self.model, dict(batch))
                output.sum().backward()
                self.model.zero_grad(set_to_none=True)

    def method(self, name: str) -> Callable[[], Any]:
        """Return what runs a method once; an engine is checked, and refused, before."""
        if name in (PLAIN, ONE_BY_ONE):
            batches = [self.batch] if name == PLAIN else self.alone
            return lambda: self.train(batches)
        featurizer = self.featurizer(name)
        return lambda: featurizer.features(self.batch)

    def said(self) -> float:
        """Return the cost of the loop that `gradients="auto"` would give, measured on three rows."""
        task, selection, projector, _ = self.plain_side.prepare()
        return cost_of_loop(
            self.model,
            lambda numbers: self.plain_side.collate(self.rows[list(numbers)]),
            3,
            output_function=task.output_function,
            parameters=selection.parameters,
            projector=projector,
        )

    def reference(self) -> torch.Tensor:
        """Return the features of the first rows from float64 autograd, one row at a time."""
        model = copy.deepcopy(self.model).double()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others do not multiply in float64
        task, selection, projector, _ = self.plain_side.prepare()
        named, found = dict(model.named_parameters()), []
        for batch in self.alone[:CHECKED_ROWS]:
            doubled = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
            output = task.output_function(model, doubled)[0].sum()
            names = list(selection.parameters)
            grads = torch.autograd.grad(output, [named[name] for name in names], allow_unused=True)
            accumulator = projector.start(1, dtype=torch.float64, device=torch.device("cpu"))
            for name, grad in zip(names, grads, strict=True):
                if grad is not None:
                    projector.add(accumulator, name, grad.unsqueeze(0))
            found.append(projector.finish(accumulator)[0])
        return torch.stack(found)


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def ratio_row(case: str, method: str, metric: str, over: list[float], under: list[float], **more: Any) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    interval = [min(ratios), max(ratios)]
    return {"case": case, "method": method, "metric": metric, "value": statistics.median(ratios), "unit": "x", "interval": interval, **more}  # fmt: skip


def time_engine(name: str, engine: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one engine, and of one-by-one passes with the loop's; none if it does not serve the model."""
    shape = shapes()[name]
    case = Case(shape, n_rows=options.rows, proj_dim=options.proj_dim)
    label = f"{shape.case(name, case.model, options.rows)}, proj_dim {options.proj_dim}"
    method, reference = f"hf_trak {engine}", case.reference()
    try:
        run = case.method(engine)
    except CheckFailed as error:
        print(f"{name}: {engine} does not serve it: {str(error)[:200]}", flush=True)
        return []
    found = run().features[:CHECKED_ROWS].double()
    error = ((found - reference).norm(dim=1) / reference.norm(dim=1)).max().item()
    if not error < TOLERANCE:
        raise SystemExit(f"Wrong answer: features of {name} by {engine} differ from float64 autograd by {error:.1e}.")
    runs = {PLAIN: case.method(PLAIN), method: run, **({ONE_BY_ONE: case.method(ONE_BY_ONE)} if engine == "loop" else {})}
    for warm in runs.values():
        warm()
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    said = []
    for _ in range(options.rounds):
        for one, run in runs.items():
            seconds[one].append(cpu_seconds(run))
        if engine == "loop":
            said.append(case.said())
    rows = []
    for one, found_seconds in list(seconds.items())[1:]:
        more = {"relative_error_to_float64": error} if one == method else {}
        times = {"cpu_seconds_plain": seconds[PLAIN], "cpu_seconds": found_seconds}
        rows.append(ratio_row(label, one, "featurize_cpu_ratio", found_seconds, seconds[PLAIN], **times, **more))
    if engine == "loop":
        rows.append(ratio_row(label, method, "loop_cpu_ratio", seconds[method], seconds[ONE_BY_ONE]))
        rows.append({
            "case": label, "method": f"{method}, as said before the run", "metric": "featurize_cpu_ratio", "unit": "x",
            "value": statistics.median(said), "interval": [min(said), max(said)],
        })  # fmt: skip
    return rows


def measure_memory(name: str, method: str, options: argparse.Namespace) -> float | None:
    """Return what this process takes at most, in GB, beyond what it had before; None if the engine does not serve the model."""
    before = _status("VmRSS")
    case = Case(shapes()[name], n_rows=options.rows, proj_dim=options.proj_dim)
    try:
        case.method(method.removeprefix("hf_trak "))()
    except CheckFailed:
        return None
    return _status("VmHWM") - before


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a separate process, and return its result. The process is forked from this one, which does no computation."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments[:-1]} did not end well.") from None
    finally:
        process.join()


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(shapes()), default=list(shapes()))
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/engines_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        for engine in ENGINES:
            for row in apart(time_engine, name, engine, options):
                print(json.dumps(row), flush=True)
                rows.append(row)
            write(options, rows)
    for name in [] if options.skip_memory else options.shapes:
        case = next(row["case"] for row in rows if row["case"].startswith(name))
        plain = apart(measure_memory, name, PLAIN, options)
        for method in (f"hf_trak {engine}" for engine in ENGINES):
            if (peak := apart(measure_memory, name, method, options)) is not None:
                row = ratio_row(case, method, "featurize_memory_ratio", [peak], [plain])
                rows.append(row | {"interval": None, "peak_gb": {"plain": plain, "featurizing": peak}})
                print(json.dumps(rows[-1]), flush=True)
        write(options, rows)
    usage = os.times()
    print(f"{usage.user + usage.system + usage.children_user + usage.children_system:.0f} CPU-seconds")


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "name": options.output.stem,
        "command": "python benchmarks/engines.py",
        "commit": commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "threads": 1},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
