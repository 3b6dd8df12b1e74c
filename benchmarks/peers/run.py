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
import run_dattri_llm
import run_traker

PEERS = (run_bergson, run_traker, run_dattri, run_dattri_llm)


# What bergson covers of the decoder: the weights of the blocks' linear layers.
BLOCKS = r"\.(c_attn|c_proj|c_fc)\.weight$"


def measure_ours(options: argparse.Namespace, *flags: str) -> list[dict[str, Any]]:
    """Return hf_trak's rows on the same workloads."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ours.json"
        common_flags = [f"--dataset={options.dataset}", f"--threads={options.threads}", f"--rounds={options.rounds or 5}"]
        common_flags += [f"--{name}={value}" for name in ("model", "rows", "batch_size") if (value := getattr(options, name))]
        script = common.ROOT / "benchmarks" / "featurize.py"
        command = [sys.executable, str(script), *common_flags, "--skip_parts", f"--output={output}", *flags]
        subprocess.run(command, check=True)
        return json.loads(output.read_text())["rows"]


def main() -> None:
    cases = {f"{peer.ENVIRONMENT.requirement.split('==')[0]}/{name}": (peer, name) for peer in PEERS for name in peer.CASES}
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--skip", nargs="+", choices=list(cases), default=[])
    skip, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = common.parse(__doc__, {}, output="results/peers_cpu.json")
    rows = measure_ours(options, "--workloads=decoder", "--memory_proj_dim", "--proj_dim", "512", "4096")
    rows += measure_ours(options, "--workloads=decoder", "--memory_proj_dim", f"--parameters={BLOCKS}")
    failed = []
    for case_name, (peer, name) in cases.items():
        if case_name in skip.skip:
            continue
        try:
            new, versions = common.measure(peer.ENVIRONMENT, name, peer.CASES[name], options, peer.__file__)
        except SystemExit as problem:
            failed.append(f"{case_name}: {problem}")
            continue
        rows += new
        common.write(options, rows, versions, command="python benchmarks/peers/run.py")
    if failed:
        raise SystemExit("\n\n".join(["Not measured:", *failed]))


if __name__ == "__main__":
    main()
