"""A finished ground truth as small files: its masks and outputs, and how reliable they are.

    python scripts/train_subsets.py --setting sst2 --scale small --output out/text
    python benchmarks/ground_truth.py --job out/text/ground_truth --case "SST-2, ..." --output results/ground_truth_text.json

Beside the JSON lies a Parquet file of the same name that `datasets.load_dataset` reads and any LDS can be computed from.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset
from featurize import write

from hf_trak.evaluation import ground_truth_from, ground_truth_reliability


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, required=True, help="folder of the job ground_truth of scripts/train_subsets.py")
    parser.add_argument("--case", required=True, help="model, data, sizes")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run, for the record")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    dataset = Dataset.from_parquet(str(options.job / "ground_truth.parquet"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(dataset.data.table, options.output.with_suffix(".parquet"), compression="zstd")
    write(options, rows_of(dataset, options), command=f"python benchmarks/ground_truth.py --output {options.output}")


def rows_of(dataset: Dataset, options: argparse.Namespace) -> list[dict[str, object]]:
    """Return the reliability, the ceiling it implies, and what a run costs."""
    _, outputs = ground_truth_from(dataset)
    found = ground_truth_reliability(outputs, n_bootstrap=1000)
    method = f"{outputs.shape[1]} subsets, mean of {outputs.shape[0]} seeds"
    seconds = [json.loads(line)["cpu_s"] for line in (options.job / "log.jsonl").read_text().splitlines()]
    quantiles = statistics.quantiles(seconds, n=20)
    values = [
        ("split_half", "Spearman", found.split_half, None),
        ("ground_truth_reliability", "share", found.reliability, None),
        ("lds_ceiling", "share", found.ceiling, list(found.interval)),
        ("run_cpu_s", "CPU s", statistics.median(seconds), [quantiles[0], quantiles[-1]]),
    ]
    keys = ("metric", "unit", "value", "interval")
    return [{"case": options.case, "method": method, **dict(zip(keys, row, strict=True))} for row in values]


if __name__ == "__main__":
    main()
