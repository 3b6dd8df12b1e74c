"""What a decoder with a large vocabulary costs: CPU time and peak memory of featurizing over a plain forward and backward of the same rows.

    python benchmarks/decoder.py --output results/decoder_cpu.json
    python benchmarks/decoder.py --model 1b --training lora --tokens 512 --dtype bfloat16 --featurizing_only --output results/decoder_1b_cpu.json

Llamas with random weights and random tokens. `small` has 12 layers of width 768 and a vocabulary of 128,256 with a tied head, 183M parameters;
`1b` has the shape of Llama 3.2 1B. `lora` trains adapters of rank 16 on the projections of attention. The answer is checked first, against a float64 loop over
short rows; both passes then take turns, and the ratio is taken round by round. The check at the start of a run, which decides between the engines,
is timed separately, and its time is given as a number of training rows. Each peak of memory is measured in a separate process. With `--many_rows`,
the peak over that many rows is compared with the peak over one batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from featurize import METHOD, cpu_seconds, featurize, peak_resident_gb, relative_error, write
from peft import LoraConfig, get_peft_model
from workloads import Workload, train

from hf_trak import Featurizer, TrakConfig
from hf_trak.projectors import make_projector
from hf_trak.tasks import AutoTask

SHAPES = {
    "small": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
VOCABULARY = 128_256


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="small")
    parser.add_argument("--training", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rows", type=int, default=2, help="in one batch, of 512 tokens; of longer rows, fewer")
    parser.add_argument("--many_rows", type=int, default=0, help="rows of 512 tokens over which memory is compared")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--featurizing_only", action="store_true", help="its peak memory and CPU time alone")
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/decoder_cpu.json"))
    parser.add_argument("--peak_memory_of", choices=["training", "featurizing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def load(options: argparse.Namespace, training: str, tokens: int, n_batches: int = 1) -> Workload:
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=True, **SHAPES[options.model]
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(getattr(torch, options.dtype)).to_empty(device="cpu")
    model.init_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no checkpoint
    model.tie_weights()
    n_weights = sum(p.numel() for p in model.parameters())
    if training == "lora":
        adapters = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, init_lora_weights=False,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        )  # fmt: skip
        model = get_peft_model(model, adapters)
    n_rows = max(1, options.rows * 512 // tokens)
    ids = torch.randint(3, VOCABULARY, (n_batches, n_rows, tokens))
    batches = [{"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some} for some in ids]
    trained = (
        f"LoRA ({sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M) on a"
        if training == "lora"
        else "full,"
    )
    case = (
        f"{trained} Llama {n_weights / 1e6:.0f}M, vocabulary {VOCABULARY:,}, {n_rows} row{'s' if n_rows > 1 else ''} of {tokens:,} tokens, "
        f"{options.dtype}, proj_dim {options.proj_dim}, 1 member"
    )
    return Workload("llama", model, batches, AutoTask.from_model(model).output_function, case)


def sketch_of(options: argparse.Namespace) -> Any:
    return make_projector("block_count_sketch", proj_dim=options.proj_dim, seed=0, fold=4)


@functools.cache
def check(model: str, proj_dim: int, training: str) -> float:
    """Return the largest relative error to a float64 loop, over two rows of 48 tokens."""
    options = argparse.Namespace(model=model, proj_dim=proj_dim, rows=1, dtype="float32")
    workload = load(options, training, 48)
    error = relative_error(workload, sketch_of(options), rows=2)
    if not error < 1e-4:
        raise SystemExit(f"Wrong answer: features differ from the float64 loop by {error:.1e}.")
    return error


def start_check_seconds(options: argparse.Namespace, workload: Workload) -> float:
    """Return the CPU time of what decides between the engines before the first row of a run is featurized."""
    ids = [ids for batch in workload.batches for ids in batch["input_ids"].tolist()]
    rows = Dataset.from_dict({"input_ids": [*ids, *ids][:3]})  # as many as are looked at
    featurizer = Featurizer(workload.model, TrakConfig(proj_dim=options.proj_dim))
    featurizer.read_from(rows)
    return cpu_seconds(featurizer.choose_engine, rows)


def time_rows(options: argparse.Namespace, training: str, tokens: int) -> Iterator[dict[str, Any]]:
    error, workload = check(options.model, options.proj_dim, training), load(options, training, tokens)
    n_rows = len(workload.batches[0]["input_ids"])
    times = [
        (cpu_seconds(train, workload.model, workload.batches), cpu_seconds(featurize, workload, sketch_of(options)))
        for _ in range(options.rounds + 1)
    ][1:]  # the first plans its tiles
    ratios = [ours / plain for plain, ours in times]
    common = {"case": workload.case, "method": METHOD, "relative_error_to_float64": error, "unit": "x"}
    yield {
        **common,
        "metric": "featurize_cpu_ratio",
        "value": statistics.median(ratios),
        "interval": [min(ratios), max(ratios)],
        "cpu_seconds_training": [plain for plain, _ in times],
        "cpu_seconds_featurizing": [ours for _, ours in times],
    }
    seconds = start_check_seconds(options, workload)
    one_row = statistics.median(plain for plain, _ in times) / n_rows
    yield {
        **common,
        "metric": "start_check_rows",
        "value": seconds / one_row,
        "unit": "rows of training",
        "interval": None,
        "cpu_seconds": seconds,
    }


def peak(options: argparse.Namespace, training: str, tokens: int, what: str, many_rows: int = 0) -> dict[str, Any]:
    """Return the peak resident memory, in GB, of a process that does nothing else, and its CPU time."""
    names = ("model", "rows", "dtype", "proj_dim", "threads")
    flags = [f"--{name}={getattr(options, name)}" for name in names]
    flags += [f"--training={training}", f"--tokens={tokens}", f"--peak_memory_of={what}", f"--many_rows={many_rows}"]
    run = subprocess.run([sys.executable, __file__, *flags], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def memory_rows(options: argparse.Namespace, training: str, tokens: int) -> Iterator[dict[str, Any]]:
    measured = ("featurizing",) if options.featurizing_only else ("training", "featurizing")
    peaks = {what: peak(options, training, tokens, what) for what in measured}
    case = peaks["featurizing"]["case"]
    common = {"case": case, "method": METHOD, "interval": None}
    gigabytes = {what: found["peak_gb"] for what, found in peaks.items()}
    if not options.featurizing_only:
        ratio = gigabytes["featurizing"] / gigabytes["training"]
        yield {**common, "metric": "featurize_memory_ratio", "value": ratio, "unit": "x", "peak_gb": gigabytes}
    yield {**common, "metric": "featurize_peak_gb", "value": gigabytes["featurizing"], "unit": "GB"}
    yield {**common, "metric": "featurize_cpu_s", "value": peaks["featurizing"]["cpu_seconds"], "unit": "s"}
    if options.many_rows and tokens == 512:
        many = peak(options, training, tokens, "featurizing", options.many_rows)["peak_gb"]
        yield {
            **common,
            "case": f"{case}; {options.many_rows} rows, over one batch",
            "metric": "memory_growth",
            "value": many / gigabytes["featurizing"],
            "unit": "x",
            "peak_gb": {"one batch": gigabytes["featurizing"], "many rows": many},
        }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        n_batches = max(1, options.many_rows // options.rows)
        workload = load(options, options.training[0], options.tokens[0], n_batches)
        if options.peak_memory_of == "training":
            seconds = cpu_seconds(train, workload.model, workload.batches)
        else:
            seconds = cpu_seconds(featurize, workload, sketch_of(options))
        print(json.dumps({"case": workload.case, "peak_gb": peak_resident_gb(), "cpu_seconds": seconds}))
        return
    rows = []
    for tokens in options.tokens:
        for training in options.training:
            times = () if options.featurizing_only else time_rows(options, training, tokens)
            for found in (times, memory_rows(options, training, tokens)):
                for row in found:
                    print(json.dumps(row), flush=True)
                    rows.append(row)
                    write(
                        options,
                        rows,
                        command=f"python benchmarks/decoder.py{options.featurizing_only * ' --model 1b --training lora --dtype bfloat16 --featurizing_only'}",
                    )


if __name__ == "__main__":
    main()
