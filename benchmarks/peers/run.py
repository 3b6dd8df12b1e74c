"""All peers, one after the other, into one file of results.

    python benchmarks/peers/run.py --dataset qnli.parquet --images cifar10.parquet --output results/peers_cpu.json

Any Python with pip will do: each peer gets an environment of its own. The file is written again after every case, so that what was
measured is not lost; a case that fails does not keep the others from being measured.
"""

from __future__ import annotations

import common
import run_bergson
import run_dattri
import run_traker

PEERS = (run_bergson, run_traker, run_dattri)


def main() -> None:
    options = common.parse(__doc__, {}, output="results/peers_cpu.json")
    rows, failed = [], []
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
