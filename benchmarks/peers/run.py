"""hf_trak and all peers, one after the other, into one file of results.

    python benchmarks/peers/run.py --dataset qnli.parquet --images cifar10.parquet --output results/peers_cpu.json

hf_trak is measured by the Python that runs this, with `featurize.py`; each peer gets an environment of its own. The file is written
again after every case, so that what was measured is not lost; a case that fails does not keep the others from being measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import run_bergson
import run_dattri
import run_traker

PEERS = (run_bergson, run_traker, run_dattri)


def measure_ours(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return hf_trak's rows, on the same workloads."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ours.json"
        flags = [f"--dataset={options.dataset}", f"--threads={options.threads}", f"--rounds={options.rounds or 3}"]
        flags += [f"--{name}={value}" for name in ("model", "rows", "batch_size") if (value := getattr(options, name))]
        script = common.ROOT / "benchmarks" / "featurize.py"
        command = [sys.executable, str(script), *flags, "--skip_parts", "--memory_proj_dim=4096", f"--output={output}"]
        subprocess.run(command, check=True)
        return json.loads(output.read_text())["rows"]


def main() -> None:
    options = common.parse(__doc__, {}, output="results/peers_cpu.json")
    rows, failed = measure_ours(options), []
    for peer in PEERS:
        for name, case in peer.CASES.items():
            try:
                new, versions = common.measure(peer.ENVIRONMENT, name, case, options, peer.__file__)
            except SystemExit as problem:
                failed.append(f"{peer.ENVIRONMENT.requirement}, {name}: {problem}")
                continue
            rows += new
            common.write(options, rows, versions, command="python benchmarks/peers/run.py")
    if failed:
        raise SystemExit("\n\n".join(["Not measured:", *failed]))


if __name__ == "__main__":
    main()
