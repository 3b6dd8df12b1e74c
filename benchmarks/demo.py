"""The demo's finds over several seeds: the share of flipped labels among the first tenth of the training set, by each ranking.

    python benchmarks/demo.py --output results/demo.json

Every seed flips other labels, splits and trains anew; the settings are the demo's defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from featurize import write

from hf_trak import AttributionIndex
from hf_trak.cli.demo import DemoArguments, run
from hf_trak.cli.demo_data import out_to_loss
from hf_trak.evaluation.mislabeled import found_share


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/demo.json"))
    return parser.parse_args()


def shares_of_one_run(seed: int) -> dict[str, float]:
    """Return the share found by each of the demo's rankings, and by leverage alone."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "demo"
        results = run(DemoArguments(seed=seed, output=str(output)))
        shares = {row["method"]: row["value"] for row in results["rows"] if row["metric"] == "flipped_found_share"}
        index = AttributionIndex(output / "run" / "index")
        flipped = np.zeros(index.n_rows, dtype=bool)
        flipped[results["flipped_rows"]] = True
        for damping in (0.1, 3.0, 10.0):
            alone = index.self_influence(damping=damping) / np.abs(out_to_loss(index))
            shares[f"leverage alone, without out-to-loss, damping {damping:g}"] = found_share(alone, flipped, 0.1)
        shares["chance"] = 0.1
    return shares


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    runs = [shares_of_one_run(seed) for seed in range(options.seeds)]
    case = f"demo: ResNet, digits, 10 % of 1,437 labels flipped, top 10 %, 1 member, mean of {options.seeds} seeds (interval: least and most)"
    rows = []
    for method in runs[0]:
        values = [shares[method] for shares in runs]
        rows.append(
            {
                "case": case,
                "method": method,
                "metric": "flipped_found_share",
                "value": statistics.mean(values),
                "unit": "share",
                "interval": [min(values), max(values)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    write(options, rows, command="python benchmarks/demo.py")


if __name__ == "__main__":
    main()
