"""Approximate search beside the exact ranking, and float32 products beside float64: what they find, what they cost.

    hf-trak featurize --model bert-sst2 --dataset train.parquet --output index --proj_dim 4096
    python benchmarks/search.py --index index --queries validation.parquet --case "SST-2, 20,000 rows, BERT-mini" \\
        --synthetic /scratch/topk --output results/search_cpu.json

`--synthetic` is a folder of `topk.py`, whose rows have no structure but their columns' sizes. Recall is of the exact `top_k` proponents and
opponents. Each kind of index is built once and searched with each `nprobe` or `efSearch` given. The exact ranking's time is that of scoring
and ranking alone, from the Parquet file; FAISS's is that of the search alone, in memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import faiss
import numpy as np
import torch
from datasets import Dataset
from topk import queries_of

from hf_trak import AttributionIndex
from hf_trak.scoring.ensemble import ScoreOptions, solve_all
from hf_trak.scoring.score import precondition, weigh
from hf_trak.scoring.scorer import Scorer
from hf_trak.scoring.top_k import TopK
from hf_trak.storage.reader import member_blocks

KINDS = {
    "Flat": [{}],
    "SQ8": [{}],
    "SQ4": [{}],
    "IVF{cells},Flat": [{"nprobe": 4}, {"nprobe": 16}, {"nprobe": 64}],
    "HNSW32": [{"efSearch": 64}, {"efSearch": 512}],
    "IVF{cells},PQ512": [{"nprobe": 64}],
}
USUAL = ["Flat", "SQ8", "SQ4", "IVF{cells},Flat"]  # the others take minutes to build at proj_dim 4,096


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="an index of a real model and training set")
    parser.add_argument("--queries", required=True, help="its queries, a Parquet file")
    parser.add_argument("--case", required=True, help="what they are, in words")
    parser.add_argument("--synthetic", type=Path, help="a folder of topk.py")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=USUAL, help="of FAISS index, for the real features")
    parser.add_argument("--synthetic_kinds", nargs="+", default=["Flat", "IVF{cells},Flat"])
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--max_queries", type=int, default=200)
    parser.add_argument("--damping", type=float, nargs="+", default=[0.0, 0.1, 3.0], help="for the products' errors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/search_cpu.json"))
    return parser.parse_args()


def recall(found: tuple[TopK, TopK], exact: tuple[TopK, TopK]) -> float:
    shares = [
        len(set(mine.tolist()) & set(best.tolist())) / len(best)
        for side, expected in zip(found, exact, strict=True)
        for mine, best in zip(side.rows, expected.rows, strict=True)
    ]
    return float(np.mean(shares))


def search_rows(
    index: AttributionIndex, features: torch.Tensor, options: argparse.Namespace, case: str, kinds: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield recall, size and time of each kind of FAISS index."""
    settings = ScoreOptions(index.resolve_damping(), out_to_loss_power=0.5)
    solved = solve_all(index.members, [features], settings)
    begin = time.process_time()
    exact = Scorer(index.members, settings, len(features), options.top_k, progress=False).best(solved)
    per_query = (time.process_time() - begin) / len(features)

    def row(method: str, metric: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
        return {"case": case, "method": method, "metric": metric, "value": value, "unit": unit, "interval": None, **more}

    yield row("exact", "search_ms_per_query", 1000 * per_query, "ms")
    for kind in kinds:
        factory = kind.format(cells=2 ** round(np.log2(2 * index.n_rows**0.5)))
        begin = time.process_time()
        search = index.add_search_index(factory, progress=False)
        built = time.process_time() - begin
        yield row(factory, "search_build_s", built, "s")
        size = faiss.serialize_index(search.index.faiss_index).nbytes
        yield row(factory, "search_bytes_per_row", size / index.n_rows, "B")
        for values in KINDS[kind]:
            for name, value in values.items():
                setattr(search.index.faiss_index.hnsw if name == "efSearch" else search.index.faiss_index, name, value)
            begin = time.process_time()
            found = search.best(solved, options.top_k)
            seconds = (time.process_time() - begin) / len(features)
            method = " ".join([factory, *(f"{name} {value}" for name, value in values.items())])
            yield row(method, f"recall_at_{options.top_k}", recall(found, exact), "share")
            yield row(method, "search_ms_per_query", 1000 * seconds, "ms")


def product_rows(
    index: AttributionIndex, features: torch.Tensor, options: argparse.Namespace, case: str
) -> Iterator[dict[str, Any]]:
    """Yield what float32 products change, and what storing the features in float16 does, over float64 products of float32 features."""
    member = index.members[0]
    blocks = list(member_blocks(member))
    phi, weight = (
        torch.cat([block.features for block in blocks]),
        weigh(torch.cat([b.out_to_loss for b in blocks]).double(), 0.5),
    )
    scale = torch.exp2(phi.abs().amax(1, keepdim=True).log2().floor() + 1)
    half = (phi / scale).half().float() * scale
    for damping in options.damping:
        solved = precondition(features, member.gram(), n_rows=len(phi), damping=damping)

        def score(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            parts = [rows_of.to(queries.dtype) @ queries.T for rows_of in rows.split(2048)]
            return torch.cat(parts) * weight.to(queries.dtype).unsqueeze(1)

        expected = score(phi, solved)
        spread, best = expected.std(0), expected.topk(options.top_k, dim=0).indices.T.tolist()
        for method, found in (
            ("float32 products of float32 features", score(phi, solved.float())),
            ("float64 products of float16 features", score(half, solved)),
        ):
            error = (((found.double() - expected) / spread).square().mean().sqrt()).item()
            mine = found.topk(options.top_k, dim=0).indices.T.tolist()
            kept = float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(mine, best, strict=True)]))
            for metric, value, unit in (
                ("score_error", error, "of the scores' spread"),
                (f"recall_at_{options.top_k}", kept, "share"),
            ):
                yield {
                    "case": f"{case}, damping {damping:g}",
                    "method": method,
                    "metric": metric,
                    "value": value,
                    "unit": unit,
                    "interval": None,
                }


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    datasets.disable_progress_bars()
    index = AttributionIndex.from_pretrained(options.index)
    queries = Dataset.from_parquet(options.queries)
    queries = queries.select(range(min(options.max_queries, len(queries))))
    features = torch.from_numpy(index.featurize_queries(queries, progress=False)["trak_features"])
    case = f"{options.case}, proj_dim {index.config.proj_dim}, {len(queries)} queries"
    rows: list[dict[str, Any]] = []
    for row in itertools.chain(
        product_rows(index, features, options, case), search_rows(index, features, options, case, options.kinds)
    ):
        print(json.dumps(row), flush=True)
        rows.append(row)
    write(options, rows)
    if options.synthetic is not None:
        index = AttributionIndex.from_pretrained(options.synthetic)
        asked = argparse.Namespace(queries=options.max_queries, proj_dim=index.config.proj_dim)
        case = f"synthetic, {index.n_rows:,} rows, proj_dim {index.config.proj_dim}, {options.max_queries} queries"
        for row in search_rows(index, torch.from_numpy(queries_of(asked)), options, case, options.synthetic_kinds):
            print(json.dumps(row), flush=True)
            rows.append(row)
        write(options, rows)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {
        "torch": torch.__version__,
        "faiss": faiss.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
    result = {
        "name": options.output.stem,
        "command": "python benchmarks/search.py",
        "commit": commit,
        "versions": versions,
        "hardware": {"machine": platform.machine(), "threads": options.threads},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
