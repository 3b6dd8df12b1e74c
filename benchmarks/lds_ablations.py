"""LDS of our own settings: proj_dim, damping, kinds of members, their share of the training set, soft threshold.

    python benchmarks/lds_ablations.py --folder out/text --alphas 0.25=out/text_25 0.75=out/text_75 \\
        --ground_truth results/ground_truth_text.parquet --case "SST-2, ..." --work out/lds_text --output results/lds_ablations_text.json

The folders of `--alphas` are those of `scripts/train_subsets.py --jobs members --alpha ALPHA`. Plots are drawn from the results:
`hf_trak.plots.save_plots`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from featurize import write
from lds import LARGE, groups_of
from lds_setting import Job, Judge, Pool, Setting, as_row, parquet

from hf_trak.evaluation import ground_truth_from, ground_truth_reliability
from hf_trak.scoring.top_k import soft_threshold

PROJ_DIMS = (64, 128, 256, 512, 1024, 2048)
PUBLISHED_DIMS = (64, 128, 256)
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SEEDS = 5
N_RUNS = 2  # full runs whose members are looked at one run at a time; a value is the mean over them
ALPHA_MEMBERS = 5

Found = tuple[str, str, list[np.ndarray], dict[str, float]]
"""What a row is about: the case's end, the method, score matrices, and the field a plot needs."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what scripts/train_subsets.py wrote: data, full, members")
    parser.add_argument("--alphas", nargs="*", default=[], metavar="ALPHA=FOLDER", help="members of other shares")
    parser.add_argument("--ground_truth", type=Path, required=True, help="Parquet file of benchmarks/ground_truth.py")
    parser.add_argument("--case", required=True, help="model, data, sizes")
    parser.add_argument("--work", type=Path, required=True, help="folder for indexes; what is there is used again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def by_proj_dim(work: Path, setting: Setting) -> Iterator[Found]:
    """One checkpoint, with and without damping."""
    for proj_dim in PROJ_DIMS:
        pool = Pool.make(work / f"of_{N_RUNS}_{proj_dim}", setting.job("full").last[:N_RUNS], setting, proj_dim)
        runs = [[run] for run in range(len(pool.queries))]
        yield "1 run", "hf_trak", [pool.score(run) for run in runs], {"proj_dim": proj_dim}
        if proj_dim < len(setting.train):
            published = [pool.score(run, 0.0, out_to_loss_power=1.0) for run in runs]
            yield "1 run", "TRAK as published", published, {"proj_dim": proj_dim}


def as_published(work: Path, setting: Setting) -> Iterator[Found]:
    """TRAK as published at smaller sketches, where it is at its best, with as many checkpoints as there are."""
    for proj_dim in PUBLISHED_DIMS:
        for name, sizes in (("full", (1, 5)), ("members", (1, 5, 15, 20))):
            job, options = setting.job(name), {}
            if name == "members":
                options["masks"] = torch.from_numpy(job.truth.masks)
            pool = Pool.make(work / f"{name}_{proj_dim}", job.last, setting, proj_dim, **options)
            for n in sizes:
                runs, halves = ("run", "a half") if n == 1 else ("runs", "halves")
                of = f"{n} {runs}" if name == "full" else f"{n} {runs} on {halves}"
                method = "TRAK as published: damping 0" + ("" if name == "full" else ", halves")
                scores = [pool.score(group, 0.0, out_to_loss_power=1.0) for group in groups_of(n, len(job.last))]
                yield f"{of}, proj_dim {proj_dim}", method, scores, {"n_checkpoints": n}


def by_damping(work: Path, setting: Setting) -> Iterator[Found]:
    """From one checkpoint to twenty."""
    full = Pool.make(work / f"full_{LARGE}", setting.job("full").last, setting, LARGE)
    halves = half_pool(work, setting)
    for damping in DAMPINGS:
        for of, pool, n in (("1 run", full, 1), ("5 runs", full, 5), ("20 runs on halves", halves, 20)):
            scores = [pool.score(group, damping) for group in groups_of(n, len(pool.queries))]
            yield of, f"hf_trak, {of}", scores, {"damping": damping}


def half_pool(work: Path, setting: Setting) -> Pool:
    job = setting.job("members")
    masks = torch.from_numpy(job.truth.masks)
    return Pool.make(work / f"members_{LARGE}", job.last, setting, LARGE, masks=masks)


def by_members(work: Path, setting: Setting) -> Iterator[Found]:
    """Members of one training run, beside members with a run each."""
    job = setting.job("full")
    runs = range(N_RUNS)
    pools = {
        "sketch seeds of one run": {"sketch_seeds_per_checkpoint": SEEDS},
        "dropout seeds of one run": {"dropout_seeds": SEEDS},
    }
    for method, options in pools.items():
        if "dropout" in method and not has_dropout(job.last[0]):
            continue
        pool = Pool.make(work / f"of_{N_RUNS}_{LARGE}_{method.split()[0]}", job.last[:N_RUNS], setting, LARGE, **options)
        for n in (1, 2, 3, SEEDS):
            groups = [list(range(SEEDS * run, SEEDS * run + n)) for run in runs]
            yield f"{n} members", method, [pool.score(group) for group in groups], {"n_members": n}
    epochs = [path for run in job.runs[:N_RUNS] for path in run]
    pool, count = Pool.make(work / f"of_{N_RUNS}_{LARGE}_epochs", epochs, setting, LARGE), len(job.runs[0])
    for n in range(1, count + 1):
        groups = [list(range(count * (run + 1) - n, count * (run + 1))) for run in runs]
        yield f"{n} members", "last epochs of one run", [pool.score(group) for group in groups], {"n_members": n}
    full, halves = Pool.make(work / f"full_{LARGE}", job.last, setting, LARGE), half_pool(work, setting)
    for method, pool, sizes in (("runs:M", full, (1, 2, 3, 5)), ("subsets:M", halves, (1, 2, 3, 5, 10, 20))):
        for n in sizes:
            scores = [pool.score(group) for group in groups_of(n, len(pool.queries))]
            yield f"{n} members", f"hf_trak {method}", scores, {"n_members": n}


def has_dropout(checkpoint: str) -> bool:
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    return any(value for key, value in config.items() if "dropout" in key and isinstance(value, float))


def by_alpha(work: Path, setting: Setting, alphas: list[str]) -> Iterator[Found]:
    """Members on a share of the training set, at the default damping and with what their masks choose."""
    jobs = [(float(alpha), Job(Path(folder) / "members")) for alpha, folder in (entry.split("=") for entry in alphas)]
    share = float(setting.job("members").truth.masks.mean())
    for alpha, job in sorted([(round(share, 3), setting.job("members")), *jobs], key=lambda pair: pair[0]):
        masks = torch.from_numpy(job.truth.masks[:ALPHA_MEMBERS])
        pool = Pool.make(work / f"alpha_{alpha}", job.last[:ALPHA_MEMBERS], setting, LARGE, masks=masks)
        members = list(range(ALPHA_MEMBERS))
        yield f"alpha {alpha}", f"hf_trak subsets:{ALPHA_MEMBERS}", [pool.score(members)], {"alpha": alpha}
        yield f"alpha {alpha}", f"hf_trak subsets:{ALPHA_MEMBERS}, damping 3", [pool.score(members, 3.0)], {"alpha": alpha}
    full = Pool.make(work / f"full_{LARGE}", setting.job("full").last, setting, LARGE)
    members = list(range(ALPHA_MEMBERS))
    yield "alpha 1", f"hf_trak subsets:{ALPHA_MEMBERS}, damping 3", [full.score(members, 3.0)], {"alpha": 1.0}


def by_soft_threshold(work: Path, setting: Setting) -> Iterator[Found]:
    """How many scores of a query stay nonzero."""
    full = Pool.make(work / f"full_{LARGE}", setting.job("full").last, setting, LARGE)
    halves = half_pool(work, setting)
    n_train = len(setting.train)
    for of, pool, n in (("5 runs", full, 5), ("20 runs on halves", halves, 20)):
        scores = torch.from_numpy(pool.score(list(range(n))))
        for keep in (n_train // 64, n_train // 32, n_train // 16, n_train // 8, n_train // 4, n_train // 2, n_train):
            found = [soft_threshold(scores, keep).numpy()]
            yield f"{of}, {keep} scores kept", f"hf_trak, {of}", found, {"soft_threshold": keep}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = Setting.load(options.folder, options.case)
    truth = ground_truth_from(parquet(options.ground_truth))
    judge, found = Judge(truth), ground_truth_reliability(truth.outputs)
    ceiling = {"case": options.case, "method": "ceiling of the ground truth", "metric": "lds_ceiling", "unit": "Spearman"}
    rows: list[dict[str, Any]] = [{**ceiling, "value": found.ceiling, "interval": list(found.interval)}]
    parts = (by_damping, by_members, by_soft_threshold, by_proj_dim, as_published)
    results = [result for part in parts for result in judged(part(options.work, setting), judge, options.case)]
    results += judged(by_alpha(options.work, setting, options.alphas), judge, options.case)
    write(options, [*rows, *results], command=f"python benchmarks/lds_ablations.py --output {options.output}")


def judged(results: Iterator[Found], judge: Judge, case: str) -> list[dict[str, Any]]:
    rows = []
    for of, method, scores, fields in results:
        rows.append(as_row(f"{case}, {of}", method, judge(scores), **fields))
        print(json.dumps({key: rows[-1][key] for key in ("case", "method", "value", "interval", *fields)}), flush=True)
    return rows


if __name__ == "__main__":
    main()
