"""All peers, one after the other, into one file of results.

    python benchmarks/peers/run.py --dataset qnli.parquet --images cifar10.parquet --output results/peers_cpu.json

Any Python with pip will do: each peer gets an environment of its own. The file is written again after every case, so that what was
measured is not lost.
"""

from __future__ import annotations

import common
import run_bergson
import run_dattri
import run_traker

PEERS = (run_bergson, run_traker, run_dattri)


def main() -> None:
    every = {f"{peer.__name__.removeprefix('run_')}-{name}": case for peer in PEERS for name, case in peer.CASES.items()}
    options = common.parse(__doc__, every, output="results/peers_cpu.json")
    rows, versions = [], {}
    for peer in PEERS:
        for name, case in peer.CASES.items():
            if options.only in (None, f"{peer.__name__.removeprefix('run_')}-{name}"):
                new, versions = common.measure(peer.ENVIRONMENT, name, case, options, peer.__file__)
                rows += new
                common.write(options, rows, versions, command="python benchmarks/peers/run.py")


if __name__ == "__main__":
    main()
