"""Seconds from a cold start to the printed training rows of 64 queries among a million: the share of each step.

    python benchmarks/cold_start.py --folder /scratch/cold --output results/cold_start_cpu.json     # 3 GB of disk

The model is a Llama of 183M random weights (`decoder.py`). To make its index, 512 rows are featurized, and a million synthetic rows in float16 replace
them. Each has a text of 60 characters. The index, the model and the texts are then dropped from the page cache. A new process imports the
package, opens the index, loads the model, featurizes 64 queries of 32 tokens, ranks all rows exactly, and prints the texts of the five best rows
of each query. Results have CPU seconds and wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the model and the index go; used again if they are there"
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--proj_dim", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/cold_start_cpu.json"))
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Save the model, featurize a few rows, and write an index of many with their checkpoint, sketch and kept texts."""
    import torch
    from datasets import Dataset
    from decoder import VOCABULARY, load
    from topk import write_shards

    from hf_trak import AttributionIndex, TrakConfig
    from hf_trak.storage.reader import MemberReader
    from hf_trak.storage.writer import MemberWriter

    index = options.folder / "index"
    if (index / "member_0" / "member.json").exists():
        return
    shape = argparse.Namespace(model="small", rows=1, dtype="float32", proj_dim=options.proj_dim)
    load(shape, "full", 64).model.save_pretrained(options.folder / "model")
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (max(64, options.queries), options.tokens)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "text": [text_of(i) for i in range(len(ids))]})
    rows.select(range(options.queries)).to_parquet(options.folder / "queries.parquet")
    config = TrakConfig(proj_dim=options.proj_dim, features_dtype="float16")
    AttributionIndex.build(
        options.folder / "few",
        models=options.folder / "model",
        dataset=rows.select(range(8)),
        config=config,
        keep_columns=["text"],
        progress=False,
    )
    member = MemberReader(options.folder / "few" / "member_0")
    index.mkdir()
    (index / "trak_config.json").write_bytes((options.folder / "few" / "trak_config.json").read_bytes())
    identity = {key: value for key, value in member.identity.items() if key not in ("n_rows", "shard_rows")}
    writer = MemberWriter(index / "member_0", identity=identity, n_rows=options.rows, shard_rows=16_384, beside=beside)
    info = {key: value for key, value in member.info.items() if key not in ("identity", "files")}
    write_shards(writer, options.proj_dim, info)


def beside(rows: range) -> Any:
    """Return the digests and texts that are stored with the features of some rows."""
    import pyarrow as pa

    return pa.table({"trak_row_digest": [f"{row:032x}" for row in rows], "text": [text_of(row) for row in rows]})


def text_of(row: int) -> str:
    return f"training row {row:09d} of a synthetic index, sixty characters"


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ask(options: argparse.Namespace) -> None:
    """Be the new process: answer, and print the seconds of each step."""
    steps: dict[str, tuple[float, float]] = {}
    last = [time.perf_counter() - time.process_time(), 0.0]  # the interpreter's own start counts as import

    def done(step: str) -> None:
        now = [time.perf_counter(), time.process_time()]
        steps[step] = (now[1] - last[1], now[0] - last[0])
        last[:] = now

    import torch
    from datasets import Dataset

    from hf_trak import AttributionIndex

    torch.set_num_threads(options.threads)
    done("import")
    index = AttributionIndex.from_pretrained(options.folder / "index")
    queries = Dataset.from_parquet(str(options.folder / "queries.parquet"), cache_dir=str(options.folder / "cache"))
    done("open the index and the queries")
    index._queries.keep_in_memory(index.passes)
    done("load the model")
    features = index.featurize_queries(queries, progress=False)
    done("featurize the queries")
    hits = index.attribute_features(features["trak_features"], options.top_k, progress=False)
    done("rank")
    lines = [
        f"{score:+.3g} {text}"
        for hit in hits
        for score, text in zip(hit["proponent_scores"], hit["proponent_text"], strict=True)
    ]
    assert len(lines) == options.queries * options.top_k
    print("\n".join(lines), file=sys.stderr)
    done("print the texts")
    print(json.dumps(steps))


def main() -> None:
    options = parse()
    if options.ask:
        ask(options)
        return
    import torch
    from featurize import write

    torch.set_num_threads(options.threads)
    prepare(options)
    forget(options.folder)
    keys = ("folder", "rows", "proj_dim", "queries", "tokens", "top_k", "threads")
    flags = [f"--{key}={getattr(options, key)}" for key in keys]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    run = subprocess.run(
        [sys.executable, __file__, "--ask", *flags], check=True, capture_output=True, text=True, env=environment
    )
    steps: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    steps = {"all": [sum(both) for both in zip(*steps.values(), strict=True)], **steps}
    case = f"{options.rows:,} × {options.proj_dim:,} float16 on disk, {options.queries} queries of {options.tokens} tokens, Llama 183M, top {options.top_k}, cold"
    rows = [
        {
            "case": case, "method": step, "metric": metric, "value": value, "unit": unit, "interval": None,
        }
        for step, (cpu, wall) in steps.items()
        for metric, value, unit in (
            ("cold_start_cpu_s", cpu, "s"),
            ("cold_start_wall_s", wall, "s"),
            ("cold_start_share", cpu / steps["all"][0], "share"),
        )
    ]  # fmt: skip
    for row in rows:
        print(json.dumps(row), flush=True)
    write(options, rows, command="python benchmarks/cold_start.py")


if __name__ == "__main__":
    main()
