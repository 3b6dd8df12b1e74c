"""What a large vocabulary costs: CPU time and peak memory of featurizing over a plain forward and backward of the same batch.

    python benchmarks/vocabulary.py --output results/vocabulary_cpu.json

A T5 with random weights, 2 + 2 layers of width 256, whose vocabulary is T5's or mT5's and whose head is the embedding (tied) or a
matrix of its own. The answer is checked first, against a float64 loop; both passes then take turns, several rounds, and the ratio is
taken round by round. Peak memory is that of a process of its own each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from featurize import METHOD, cpu_seconds, featurize, peak_resident_gb, relative_error, write
from workloads import Workload, train

from hf_trak.projectors import make_projector
from hf_trak.tasks import AutoTask


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[250112, 32000])
    parser.add_argument("--head", nargs="+", choices=["tied", "untied"], default=["untied", "tied"])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--input_tokens", type=int, default=32)
    parser.add_argument("--target_tokens", type=int, default=12)
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/vocabulary_cpu.json"))
    parser.add_argument("--peak_memory_of", choices=["training", "featurizing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def load(options: argparse.Namespace, vocabulary: int, head: str) -> Workload:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=vocabulary, d_model=256, d_kv=64, d_ff=1024, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    if head == "untied":  # what the configuration says of it is overruled
        model.lm_head.weight = torch.nn.Parameter(0.05 * torch.randn_like(model.lm_head.weight))
    assert (model.lm_head.weight is model.shared.weight) == (head == "tied")
    task = AutoTask.from_model(model)
    inputs = torch.randint(3, vocabulary, (options.rows, options.input_tokens)).tolist()
    targets = torch.randint(3, vocabulary, (options.rows, options.target_tokens)).tolist()
    size = options.batch_size
    batches = [
        task.collate({"input_ids": inputs[row : row + size], "labels": targets[row : row + size]}, None)
        for row in range(0, options.rows, size)
    ]
    case = (
        f"T5 {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M, 2+2 layers, width 256, vocabulary {vocabulary}, {head} head, {options.input_tokens} input and {options.target_tokens} "
        f"target tokens, batch {size}, proj_dim {options.proj_dim}, 1 member"
    )
    return Workload("t5", model, batches, task.output_function, case)


def time_row(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    projector = make_projector("block_count_sketch", proj_dim=options.proj_dim, seed=0, fold=4)
    error = relative_error(workload, projector, rows=2)
    if not error < 1e-4:
        raise SystemExit(f"Wrong answer: features differ from the float64 loop by {error:.1e}.")
    featurize(workload, projector)
    train(workload.model, workload.batches[-1:])
    times = [
        (cpu_seconds(train, workload.model, workload.batches), cpu_seconds(featurize, workload, projector))
        for _ in range(options.rounds)
    ]
    ratios = [ours / plain for plain, ours in times]
    return {
        "case": workload.case,
        "method": METHOD,
        "relative_error_to_float64": error,
        "metric": "featurize_cpu_ratio",
        "value": statistics.median(ratios),
        "unit": "x",
        "interval": [min(ratios), max(ratios)],
        "cpu_seconds_training": [plain for plain, _ in times],
        "cpu_seconds_featurizing": [ours for _, ours in times],
    }


def peak_memory(options: argparse.Namespace, vocabulary: int, head: str, what: str) -> float:
    """Peak resident memory, in GB, of a process that does nothing else."""
    names = ("rows", "batch_size", "input_tokens", "target_tokens", "proj_dim", "threads")
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    flags += [f"--vocabulary={vocabulary}", f"--head={head}", f"--peak_memory_of={what}"]
    run = subprocess.run([sys.executable, __file__, *flags], check=True, capture_output=True, text=True)
    return float(run.stdout.split()[-1])


def rows_of(options: argparse.Namespace, vocabulary: int, head: str) -> Iterator[dict[str, Any]]:
    peaks = {what: peak_memory(options, vocabulary, head, what) for what in ("training", "featurizing")}
    workload = load(options, vocabulary, head)
    yield {
        "case": workload.case,
        "method": METHOD,
        "metric": "featurize_memory_ratio",
        "value": peaks["featurizing"] / peaks["training"],
        "unit": "x",
        "interval": None,
        "peak_gb": peaks,
    }
    yield time_row(options, workload)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        workload = load(options, options.vocabulary[0], options.head[0])
        if options.peak_memory_of == "training":
            train(workload.model, workload.batches)
        else:
            featurize(workload, make_projector("block_count_sketch", proj_dim=options.proj_dim, seed=0, fold=4))
        print(peak_resident_gb())
        return
    rows = []
    for vocabulary in options.vocabulary:
        for head in options.head:
            for row in rows_of(options, vocabulary, head):
                print(json.dumps(row), flush=True)
                rows.append(row)
    write(options, rows, command="python benchmarks/vocabulary.py")


if __name__ == "__main__":
    main()
