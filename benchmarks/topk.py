"""The best of a million: exact top-k over features on disk, beside reading the file and one matrix product, and its peak memory.

    python benchmarks/topk.py --folder /scratch/topk --output results/topk_cpu.json     # 8.2 GB of disk, some ten minutes

Synthetic float16 rows are written through the real store, once; then three processes of their own run one after the other. `baseline`
reads the Parquet file to a float32 matrix, a row group at a time, and multiplies it with the queries, keeping nothing. `exact` is
`AttributionIndex.attribute_features`: it solves the queries, scores every row and keeps each query's best. The answer is checked against
float64 scores of some of the queries. Times are CPU seconds; wall times stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import torch

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.linalg import accumulate_gram
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.writer import MemberWriter

CHECKED = 20  # queries
GRAM_SHARDS = 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the features go; kept, and used again if they are there"
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--shard_rows", type=int, default=16_384)
    parser.add_argument("--max_memory", default="1GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often reading and ranking take turns; medians, least and most"
    )
    parser.add_argument("--output", type=Path, default=Path("results/topk_cpu.json"))
    parser.add_argument("--part", choices=["baseline", "exact", "check"], help=argparse.SUPPRESS)
    return parser.parse_args()


def write_features(options: argparse.Namespace) -> None:
    """Write the rows of one member: correlated columns, as gradients have, and rows of very different size."""
    if (options.folder / "member_0" / "member.json").exists():
        return
    if options.folder.exists() and any(options.folder.iterdir()):
        raise SystemExit(f"{options.folder} is not empty and holds no finished member. Delete it, or choose another folder.")
    config = TrakConfig(task="text-classification", proj_dim=options.proj_dim, features_dtype="float16")
    config.save_pretrained(options.folder)
    identity = {
        "task": config.task,
        "out_to_loss_kind": "one_minus_p",
        "seed": 0,
        "dropout_seed": None,
        "dataset": {"fingerprint": "synthetic"},
        "config": config.identity(),
    }
    writer = MemberWriter(options.folder / "member_0", identity=identity, n_rows=options.rows, shard_rows=options.shard_rows)
    write_shards(
        writer, options.proj_dim, {"checkpoint": {"path": None, "repo": None, "revision": None}, "checkpoint_number": 0}
    )


def write_shards(writer: MemberWriter, proj_dim: int, description: dict[str, Any]) -> None:
    """Fill a member with synthetic rows, and finish it."""
    mixing = torch.logspace(0, -1.5, proj_dim)
    gram = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for shard in range(writer.n_shards):
        generator = torch.Generator().manual_seed(shard)
        features = torch.randn(len(writer.rows(shard)), proj_dim, generator=generator).mul_(mixing)
        features.mul_(torch.randn(len(features), 1, generator=generator).exp_())
        out_to_loss = torch.rand(len(features), generator=generator)
        writer.write(shard, encode_columns(features, out_to_loss, out_to_loss, dtype="float16"))
        if (
            shard < GRAM_SHARDS
        ):  # rows are drawn alike, so these stand for all; a Gram matrix of all would take longer than the search
            for block in features.split(4096):
                accumulate_gram(gram, block)
    gram *= writer.n_shards / min(GRAM_SHARDS, writer.n_shards)
    writer.finish(gram, description)


def queries_of(options: argparse.Namespace) -> np.ndarray:
    generator = torch.Generator().manual_seed(2**31)
    mixing = torch.logspace(0, -1.5, options.proj_dim)
    return (torch.randn(options.queries, options.proj_dim, generator=generator) * mixing).numpy()


def read_and_multiply(options: argparse.Namespace) -> None:
    """The baseline: what no search that looks at every row can do without."""
    queries = torch.from_numpy(queries_of(options)).T.contiguous()
    for path in sorted((options.folder / "member_0").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["trak_features"], use_threads=False).column(0)
                values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
                torch.from_numpy(values.astype(np.float32)).view(-1, options.proj_dim) @ queries


def attribute(options: argparse.Namespace) -> Any:
    index = AttributionIndex.from_pretrained(options.folder)
    return index.attribute_features(
        queries_of(options), options.top_k, max_memory=options.max_memory, progress=sys.stderr.isatty()
    )


def check(options: argparse.Namespace) -> float:
    """Return the share of the exact best, by float64 scores, that was found; of some queries."""
    options.queries, every = CHECKED, options.queries
    index = AttributionIndex.from_pretrained(options.folder)
    reader, options.queries = index.members[0], every
    queries = torch.from_numpy(queries_of(options)[:CHECKED]).double()
    from hf_trak.scoring.score import precondition, weigh

    solved = precondition(queries, reader.gram(), n_rows=reader.n_rows, damping=index.resolve_damping())
    scores = torch.cat(
        [(s.features.double() @ solved.T) * weigh(s.out_to_loss.double(), 0.5)[:, None] for s in reader.shards()]
    )
    best = scores.topk(min(options.top_k, len(scores)), dim=0).indices.T
    found = json.loads((options.folder / "hits.json").read_text())
    shares = [len(set(mine) & set(exact)) / len(exact) for mine, exact in zip(found[:CHECKED], best.tolist(), strict=True)]
    return sum(shares) / len(shares)


def peak_resident_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def run_part(options: argparse.Namespace) -> None:
    """One process: print its times and peak."""
    before, begin, cpu = peak_resident_gb(), time.perf_counter(), time.process_time()
    share = None
    if options.part == "baseline":
        read_and_multiply(options)
    elif options.part == "exact":
        hits = attribute(options)
    else:
        share = check(options)
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - begin}
    if options.part == "exact":
        (options.folder / "hits.json").write_text(json.dumps([list(rows) for rows in hits["proponents"][:]]))
    print(json.dumps({**times, "peak_gb": peak_resident_gb(), "peak_gb_before": before, "share": share}))


def measure(options: argparse.Namespace, part: str) -> dict[str, Any]:
    keys = ("folder", "rows", "proj_dim", "queries", "top_k", "max_memory", "threads")
    flags = [f"--{key}={getattr(options, key)}" for key in keys]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    run = subprocess.run(
        [sys.executable, __file__, f"--part={part}", *flags], check=True, stdout=subprocess.PIPE, env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.part:
        run_part(options)
        return
    write_features(options)
    size = sum(path.stat().st_size for path in (options.folder / "member_0").glob("*.parquet"))
    rounds = [{part: measure(options, part) for part in ("baseline", "exact")} for _ in range(options.rounds)]
    share = measure(options, "check")["share"]
    case = (
        f"{options.rows:,} × {options.proj_dim:,} float16 on disk, {options.queries:,} queries, top {options.top_k}, 1 member"
    )

    def row(method: str, metric: str, values: list[float], unit: str, **more: Any) -> dict[str, Any]:
        interval = [min(values), max(values)] if len(values) > 1 else None
        value = statistics.median(values)
        return {"case": case, "method": method, "metric": metric, "value": value, "unit": unit, "interval": interval, **more}

    def of(part: str, key: str) -> list[float]:
        return [found[part][key] for found in rounds]

    def ratios(key: str) -> list[float]:
        return [ours / base for ours, base in zip(of("exact", key), of("baseline", key), strict=True)]

    mine, plain = "hf_trak attribute_features", "reading the file and one float32 matrix product"
    limits = {"max_memory": options.max_memory, "before_gb": max(of("exact", "peak_gb_before"))}
    rows = [
        row(mine, "topk_time_ratio", ratios("cpu_s"), "x", wall_ratio=statistics.median(ratios("wall_s"))),
        row(mine, "topk_peak_rss_gb", of("exact", "peak_gb"), "GB", **limits),
        row(mine, "topk_recall_of_float64", [share], "share", queries_checked=CHECKED),
        row(mine, "topk_cpu_s", of("exact", "cpu_s"), "s", wall_s=of("exact", "wall_s")),
        row(plain, "topk_cpu_s", of("baseline", "cpu_s"), "s", wall_s=of("baseline", "wall_s")),
        row(plain, "topk_peak_rss_gb", of("baseline", "peak_gb"), "GB"),
        row("Parquet", "features_gb", [size / 1e9], "GB"),
    ]
    for line in rows:
        print(json.dumps(line))
    write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"torch": torch.__version__, "pyarrow": pyarrow.__version__, "python": platform.python_version()}
    result = {
        "name": options.output.stem,
        "command": "python benchmarks/topk.py",
        "commit": commit,
        "versions": versions,
        "hardware": {"machine": platform.machine(), "threads": options.threads},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
