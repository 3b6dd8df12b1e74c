"""What hashing the rows of a training set costs: `python benchmarks/row_digests.py FILE [FILE ...]`, Parquet files."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

from datasets import load_dataset

from hf_trak.sources.row_digests import digest_rows

N_ROWS = 10_000


def main(paths: list[str]) -> None:
    """Print a JSON line per file: CPU seconds of its first rows, in their order and shuffled."""
    for path in paths:
        dataset = load_dataset("parquet", data_files=path, split="train")
        dataset = dataset.select(range(min(N_ROWS, len(dataset))))
        for order, rows in (("stored", dataset), ("shuffled", dataset.shuffle(seed=0))):
            begin = time.process_time()
            digests = digest_rows(rows, rows.column_names)
            seconds = time.process_time() - begin
            case = {"case": f"{Path(path).parent.name}, {len(digests):,} rows, {order}", "metric": "digest_cpu_s"}
            print(json.dumps({**case, "value": round(seconds, 3), "unit": "CPU s", "hardware": platform.machine()}))


if __name__ == "__main__":
    main(sys.argv[1:])
