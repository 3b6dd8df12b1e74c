"""LDS by method on one setting: the same checkpoints, queries and ground truth for all.

    python scripts/train_subsets.py --setting sst2 --scale small --output out/text
    python benchmarks/lds.py --folder out/text --ground_truth results/ground_truth_text.parquet --case "SST-2, ..." \\
        --work out/lds_text --output results/lds_text.json

Where an ensemble has fewer checkpoints than there are, its LDS is the mean over disjoint groups of them. Intervals are of a
bootstrap over subsets, with the same draws for every method; a ratio's is that of the ratio under each draw. `compute_s` is what
training and featurizing cost, in CPU seconds. `lds_ablations.py` has the rest: proj_dim, damping, kinds of members.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from featurize import write
from lds_setting import Judge, Pool, Setting, as_row, parquet

from hf_trak import TrakConfig
from hf_trak.evaluation import ground_truth_from, ground_truth_reliability
from hf_trak.evaluation.baselines import SUBSET_FITS, Checkpoints, make_baseline

SMALL, LARGE = 512, 2048
"""Sketch sizes. λ = 0 needs one well below the number of training rows; with damping, larger is better."""

PUBLISHED = f"TRAK as published: damping 0, proj_dim {SMALL}"
REFERENCE = f"MadryLab/trak's scores: damping 0, rescaled, proj_dim {SMALL}"
OURS, OURS_SMALL = f"hf_trak, proj_dim {LARGE}", f"hf_trak, proj_dim {SMALL}"

OF_CHECKPOINTS = (
    *("representation_dot", "representation_cosine", "gradient_dot", "gradient_cosine"),
    *("output_gradient_dot", "output_gradient_cosine", "influence_ekfac"),
)
ARNOLDI = {"n_iterations": 40, "n_eigenvectors": 20, "n_hessian_rows": 256}
"""Of the Hessian of all rows, the eigenvectors would cost more than all else here together."""
OF_RUNS = ("tracin_cp", "gas")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what scripts/train_subsets.py wrote: data, full, members")
    parser.add_argument("--ground_truth", type=Path, required=True, help="Parquet file of benchmarks/ground_truth.py")
    parser.add_argument("--case", required=True, help="model, data, sizes")
    parser.add_argument("--work", type=Path, required=True, help="folder for indexes; what is there is used again")
    parser.add_argument("--scores", type=Path, help="folder for the scores of the largest ensembles, METHOD-N.npy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def groups_of(size: int, count: int, *, most: int = 4) -> list[list[int]]:
    """Return disjoint groups of `size` among `count`, `most` at most; for groups of one, all that there are up to five."""
    most = 5 if size == 1 else most
    return [list(range(start, start + size)) for start in range(0, count - size + 1, size)][:most]


class Comparison:
    """Rows of results, and the draws behind them, by method and number of checkpoints."""

    def __init__(self, case: str, judge: Judge, folder: Path | None = None) -> None:
        self.case = case
        self.folder = folder
        self.judge = judge
        self.rows: list[dict[str, Any]] = []
        self.draws: dict[tuple[str, int], np.ndarray] = {}

    def add(self, method: str, n: int, groups: Sequence[np.ndarray], *, of: str, compute_s: float) -> None:
        values = self.judge(groups)
        self.draws[method, n] = values
        if self.folder is not None and len(groups) == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            np.save(self.folder / f"{re.sub('[^a-z0-9]+', '_', method.lower())}-{n}.npy", groups[0])
        self._keep(as_row(f"{self.case}, {of}", method, values, n_checkpoints=n, compute_s=compute_s))

    def ratio(self, ours: tuple[str, int], other: tuple[str, int], of: str) -> None:
        values = self.draws[ours] / self.draws[other]
        self._keep(as_row(f"{self.case}, {of}", f"{ours[0]} / {other[0]}", values, metric="lds_ratio"))

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps({key: row[key] for key in ("case", "method", "value", "interval")}), flush=True)


def of_full_runs(compare: Comparison, work: Path, setting: Setting) -> None:
    """Ours and the paper's, on checkpoints of the whole training set."""
    job = setting.job("full")
    large, small = (Pool.make(work / f"full_{size}", job.last, setting, size) for size in (LARGE, SMALL))
    for n in (1, 2, 3, 5):
        groups, of = groups_of(n, len(job.last)), f"{n} runs" if n > 1 else "1 run"
        cost = n * (job.run_cpu_s + large.member_cpu_s)
        variants: list[tuple[str, Pool, dict[str, Any]]] = [
            (OURS, large, {}),
            (f"{OURS}, residual weighting and leverage", large, {"residual_weighting": True, "leverage": True}),
            (OURS_SMALL, small, {}),
            (f"{OURS}, out_to_loss_power 1", large, {"out_to_loss_power": 1.0}),
            (PUBLISHED, small, {"damping": 0.0, "out_to_loss_power": 1.0, "combination": "means"}),
            (REFERENCE, small, {"damping": 0.0, "out_to_loss_power": 1.0, "combination": "means", "reference_rescale": True}),
        ]
        for method, pool, options in variants:
            compare.add(method, n, [pool.score(group, **options) for group in groups], of=of, compute_s=cost)


def of_half_subsets(compare: Comparison, work: Path, setting: Setting) -> None:
    """Ours and the paper's, on checkpoints of random halves, whose masks choose the damping."""
    job = setting.job("members")
    masks = torch.from_numpy(job.truth.masks)
    large, small = (Pool.make(work / f"members_{size}", job.last, setting, size, masks=masks) for size in (LARGE, SMALL))
    check_same_as_index(large, setting)
    for n in (1, 2, 3, 5, 10, 15, 20):
        groups, of = groups_of(n, len(job.last)), f"{n} runs on halves" if n > 1 else "1 run on a half"
        cost = n * (job.run_cpu_s + large.member_cpu_s)
        for method, pool, options in (
            (f"{OURS}, subsets:M", large, {}),
            (f"{OURS_SMALL}, subsets:M", small, {}),
            (f"{OURS}, subsets:M, out_to_loss_power 1", large, {"out_to_loss_power": 1.0}),
            (f"{PUBLISHED}, halves", small, {"damping": 0.0, "out_to_loss_power": 1.0, "combination": "means"}),
        ):
            compare.add(method, n, [pool.score(group, **options) for group in groups], of=of, compute_s=cost)
    outputs = job.truth.outputs.mean(0)
    for name, fit in SUBSET_FITS.items():
        n = len(outputs)
        compare.add(name, n, [fit(job.truth.masks, outputs)], of=f"{n} runs on halves", compute_s=n * job.run_cpu_s)


def check_same_as_index(pool: Pool, setting: Setting) -> None:
    """What is judged here is what users get."""
    expected = pool.index.score(setting.queries, progress=False)
    actual = pool.score(range(len(pool.queries)))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    if not error < 1e-4:
        raise SystemExit(f"The ensemble's scores differ from AttributionIndex.score by {error:.1e}.")


def of_baselines(compare: Comparison, work: Path, setting: Setting) -> None:
    """Everything else, at one checkpoint and at five."""
    job = setting.job("full")
    config = TrakConfig(proj_dim=LARGE)
    shared = [Checkpoints(path, config) for path in job.last]  # baselines that read gradients share them
    for name in OF_CHECKPOINTS:
        add_baseline(compare, work, setting, name, lambda run, name=name: make_baseline(name, shared[run]))
    epochs = [Checkpoints(run, config) for run in job.runs]
    for name in OF_RUNS:
        add_baseline(compare, work, setting, name, lambda run, name=name: make_baseline(name, epochs[run]))
    arnoldi = f"influence_arnoldi, Hessian of {ARNOLDI['n_hessian_rows']} rows"
    add_baseline(compare, work, setting, arnoldi, lambda run: make_baseline("influence_arnoldi", shared[run], **ARNOLDI))
    random = [make_baseline("random", seed=seed)(setting.train, setting.queries) for seed in range(5)]
    compare.add("random", 0, random, of="no run", compute_s=0.1)
    if "sentence" in setting.train.column_names:
        begin = time.process_time()
        scores = make_baseline("bm25", Checkpoints(job.last[0], TrakConfig(text_columns=("sentence",))))(
            setting.train, setting.queries
        )
        compare.add("bm25", 0, [scores], of="no run", compute_s=time.process_time() - begin)


def add_baseline(
    compare: Comparison, work: Path, setting: Setting, name: str, make: Callable[[int], Callable[..., np.ndarray]]
) -> None:
    """Score with every run by itself; an ensemble's scores are their mean. What an earlier call found is found again."""
    job = setting.job("full")
    scores, seconds = [], []
    for run in range(len(job.runs)):
        found = work / "baselines" / f"{name.split(',')[0]}-{run}.npz"
        if not found.exists():
            found.parent.mkdir(parents=True, exist_ok=True)
            begin = time.process_time()
            result = make(run)(setting.train, setting.queries)
            np.savez(found, scores=result, seconds=time.process_time() - begin)
        with np.load(found) as kept:
            scores.append(kept["scores"])
            seconds.append(float(kept["seconds"]))
    # Gradients that an earlier baseline left are not paid for again in time, but they are in the reckoning.
    cost = job.run_cpu_s + max(seconds)
    compare.add(name, 1, scores, of="1 run", compute_s=cost)
    compare.add(name, len(scores), [np.mean(scores, axis=0)], of=f"{len(scores)} runs", compute_s=len(scores) * cost)


def ratios() -> Iterator[tuple[tuple[str, int], tuple[str, int], str]]:
    """What is claimed."""
    for n, of in ((1, "1 run"), (5, "5 runs")):
        for ours in (OURS_SMALL, OURS):
            yield (ours, n), (REFERENCE, n), of
        yield (OURS, n), ("influence_ekfac", n), of
    for ours in (OURS_SMALL, OURS):
        yield (f"{ours}, subsets:M", 5), (f"{PUBLISHED}, halves", 15), "5 runs on halves / 15"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    setting = Setting.load(options.folder, options.case)
    truth = ground_truth_from(parquet(options.ground_truth))
    compare = Comparison(options.case, Judge(truth), options.scores)
    found = ground_truth_reliability(truth.outputs)
    ceiling = {"case": options.case, "method": "ceiling of the ground truth", "metric": "lds_ceiling", "unit": "Spearman"}
    compare.rows.append({**ceiling, "value": found.ceiling, "interval": list(found.interval)})
    of_full_runs(compare, options.work, setting)
    of_baselines(compare, options.work, setting)
    of_half_subsets(compare, options.work, setting)
    for ours, other, of in ratios():
        compare.ratio(ours, other, of)
    write(options, compare.rows, command=f"python benchmarks/lds.py --output {options.output}")


if __name__ == "__main__":
    main()
