"""From what was measured to what a training set of 1e6, 1e8 and 1e10 rows takes: docs/evidence/scaling.md's sums, and nothing measured anew.

    python benchmarks/scaling.py      # reads results/featurize_cpu.json, topk_cpu.json and search_cpu.json, writes scaling.json

Everything is in proportion to the number of rows. Prices are assumptions, not offers.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
SIZES = (10**6, 10**8, 10**10)
CORE_HOUR, GB_MONTH, GPU_HOUR = 0.04, 0.02, 2.0  # US dollars: assumed
ROWS_PER_FOLDER = 10_000  # files that a folder of a Hub repository should hold at most
COMPRESSED = "SQ4"


def rows_of(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def find(name: str, metric: str, *, case: str = "", method: str = "") -> dict[str, Any]:
    return next(
        row
        for row in rows_of(name)
        if row["metric"] == metric and re.search(case, row["case"]) and re.search(method, row["method"])
    )


def number_of_rows(case: str) -> int:
    return int(re.search(r"([\d,]+) (?:rows|×)", case)[1].replace(",", ""))  # type: ignore[index]


def rates() -> dict[str, float]:
    """What one row costs, as measured: seconds and bytes."""
    featurized = find("featurize_cpu", "featurize_cpu_ratio", case="MiniLM")
    scored, stored = find("topk_cpu", "topk_cpu_s", method="hf_trak"), find("topk_cpu", "features_gb")
    compressed = find("search_cpu", "search_bytes_per_row", method=f"^{COMPRESSED}", case="^(?!synthetic)")
    return {
        "featurize_s": statistics.median(featurized["cpu_seconds_featurizing"]) / number_of_rows(featurized["case"]),
        "score_s": scored["value"] / number_of_rows(scored["case"]),
        "stored_bytes": stored["value"] * 1e9 / number_of_rows(stored["case"]),
        "flat_bytes": find("search_cpu", "search_bytes_per_row", method="^Flat")["value"],
        "compressed_bytes": compressed["value"],
    }


def sums(n_rows: int, rate: dict[str, float]) -> list[tuple[str, str, float, str]]:
    featurize, score = rate["featurize_s"] * n_rows / 3600, rate["score_s"] * n_rows / 3600
    gigabytes = rate["stored_bytes"] * n_rows / 1e9
    return [
        ("featurize, MiniLM-L6 on QNLI", "scaling_core_hours", featurize, "core-hours"),
        ("featurize, MiniLM-L6 on QNLI", "scaling_usd", featurize * CORE_HOUR, "USD"),
        ("store, proj_dim 4,096 in float16", "scaling_gb", gigabytes, "GB"),
        ("store, proj_dim 4,096 in float16", "scaling_usd_per_month", gigabytes * GB_MONTH, "USD"),
        ("exact top 100 of 1,000 queries", "scaling_core_hours", score, "core-hours"),
        ("exact top 100 of 1,000 queries", "scaling_usd", score * CORE_HOUR, "USD"),
        ("FAISS Flat, in memory", "scaling_gb", rate["flat_bytes"] * n_rows / 1e9, "GB"),
        (f"FAISS {COMPRESSED}, in memory", "scaling_gb", rate["compressed_bytes"] * n_rows / 1e9, "GB"),
        ("the whole score matrix of 1,000 queries", "scaling_gb", 4e3 * n_rows / 1e9, "GB"),
        ("self-influence, or leverage of each row, in memory", "scaling_gb", 16 * n_rows / 1e9, "GB"),
        ("files at the default shard_rows of 1,024", "scaling_files", n_rows / 1024, ""),
        (f"shard_rows for {ROWS_PER_FOLDER:,} files", "scaling_shard_rows", max(1024, n_rows / ROWS_PER_FOLDER), "rows"),
        (
            f"one shard lost, at {ROWS_PER_FOLDER:,} files",
            "scaling_core_hours",
            max(1024, n_rows / ROWS_PER_FOLDER) * rate["featurize_s"] / 3600,
            "core-hours",
        ),
    ]


def main() -> None:
    rate = rates()
    rows = [
        {
            "case": f"{n_rows:.0e} rows".replace("e+0", "e").replace("e+", "e"),
            "method": method,
            "metric": metric,
            "value": value,
            "unit": unit,
            "interval": None,
        }
        for n_rows in SIZES
        for method, metric, value, unit in sums(n_rows, rate)
    ]
    units = {"featurize_s": "s", "score_s": "s", "stored_bytes": "B", "flat_bytes": "B", "compressed_bytes": "B"}
    rows += [
        {
            "case": "one row",
            "method": name.rsplit("_", 1)[0],
            "metric": "scaling_rate",
            "value": value,
            "unit": units[name],
            "interval": None,
        }
        for name, value in rate.items()
    ]
    for method, value, unit in (
        ("a core for an hour", CORE_HOUR, "USD"),
        ("a GB for a month", GB_MONTH, "USD"),
        ("a GPU for an hour", GPU_HOUR, "USD"),
        ("cores' work that a GPU has to do to be as cheap", GPU_HOUR / CORE_HOUR, "cores"),
    ):
        rows.append(
            {"case": "assumed", "method": method, "metric": "scaling_price", "value": value, "unit": unit, "interval": None}
        )
    source = json.loads((RESULTS / "topk_cpu.json").read_text())
    result = {
        "name": "scaling",
        "command": "python benchmarks/scaling.py",
        "commit": source["commit"],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "hardware": source["hardware"],
        "rows": rows,
    }
    (RESULTS / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
