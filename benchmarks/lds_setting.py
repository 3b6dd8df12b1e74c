"""A setting of `lds.py`: its data, checkpoints and ground truth, members of an index to draw ensembles from, and the judge."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.evaluation import GroundTruth, ground_truth_from, predicted_outputs, spearman
from hf_trak.evaluation.lds import percentile_interval
from hf_trak.hashing import hash_json
from hf_trak.linalg import default_damping
from hf_trak.scoring.damping import choose_damping
from hf_trak.scoring.ensemble import ScoreOptions, default_power, solve_all, stream_scores

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import paper_models  # noqa: F401  so that checkpoints of its classes load

POWER = default_power("one_minus_p")


def parquet(path: Path) -> Dataset:
    return Dataset.from_parquet(str(path))


@dataclass(frozen=True)
class Job:
    """What one job of `scripts/train_subsets.py` left.

    Args:
        folder (`Path`): The job's.
    """

    folder: Path

    @cached_property
    def truth(self) -> GroundTruth:
        """Masks, and outputs by seed and subset."""
        return ground_truth_from(parquet(self.folder / f"{self.folder.name}.parquet"))

    @cached_property
    def runs(self) -> list[list[str]]:
        """The checkpoints of every run, by epoch."""
        return [
            [str(epoch) for epoch in sorted(run.iterdir()) if epoch.is_dir()]
            for run in sorted((self.folder / "checkpoints").iterdir())
        ]

    @property
    def last(self) -> list[str]:
        """The last checkpoint of every run."""
        return [epochs[-1] for epochs in self.runs]

    @cached_property
    def run_cpu_s(self) -> float:
        """What a run costs."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return statistics.median(json.loads(line)["cpu_s"] for line in lines)


class Setting(NamedTuple):
    """A folder of `scripts/train_subsets.py`, and the ground truth that was made with its settings."""

    folder: Path
    case: str
    train: Dataset
    queries: Dataset

    @classmethod
    def load(cls, folder: Path, case: str) -> Setting:
        return cls(folder, case, parquet(folder / "data" / "train.parquet"), parquet(folder / "data" / "queries.parquet"))

    def job(self, name: str) -> Job:
        return Job(self.folder / name)


@dataclass(frozen=True)
class Pool:
    """Members of one index, to draw ensembles from; queries are featurized once.

    Args:
        index (`AttributionIndex`): Its members, and which checkpoint each is of.
        queries (`list[torch.Tensor]`): By member, (n_query, proj_dim).
        member_cpu_s (`float`): What featurizing one member's checkpoint cost.
    """

    index: AttributionIndex
    queries: list[torch.Tensor]
    member_cpu_s: float

    @classmethod
    def make(cls, folder: Path, models: Sequence[str], setting: Setting, proj_dim: int, **options: Any) -> Pool:
        begin = time.process_time()
        arguments = {"dataset": setting.train, "config": TrakConfig(proj_dim=proj_dim), "progress": False, **options}
        index = AttributionIndex.build(folder, models=list(models), **arguments)
        seconds = (time.process_time() - begin) / len(index.passes)
        cost = folder / "cpu_s.txt"  # of the first time: an index that is there already is only loaded
        if not cost.exists():
            cost.write_text(str(seconds))
        queries = [
            torch.from_numpy(index.featurize_queries(setting.queries, member, progress=False)["trak_features"])
            for member in range(len(index.members))
        ]
        return cls(index, queries, float(cost.read_text()))

    @cached_property
    def checkpoints(self) -> list[int]:
        return [plan.checkpoint for plan in self.index.passes for _ in plan.members]

    def damping(self, members: Sequence[int], damping: float | str) -> float:
        """Return λ as `AttributionIndex` would, had it these members alone."""
        if damping != "auto":
            return float(damping)
        checkpoints = [self.checkpoints[member] for member in members]
        chosen = [self.index.members[member] for member in members]
        choice = choose_damping(chosen, checkpoints, out_to_loss_power=POWER)
        return default_damping(len(set(checkpoints))) if choice is None else choice.damping

    def score(self, members: Sequence[int], damping: float | str = "auto", **options: Any) -> np.ndarray:
        """Return the scores of an ensemble, (n_train, n_query); those of an earlier run are found again."""
        chosen = [self.index.members[member] for member in members]
        settings = ScoreOptions(self.damping(members, damping), **{"out_to_loss_power": POWER, **options})
        found = self.index.folder / "scores" / f"{hash_json([list(members), asdict(settings)])[:16]}.npy"
        if found.exists():
            return np.load(found)
        solved = solve_all(chosen, [self.queries[number] for number in members], settings)
        blocks = stream_scores(chosen, solved, out_to_loss_power=settings.out_to_loss_power, combination=settings.combination)
        found.parent.mkdir(exist_ok=True)
        np.save(found, torch.cat(list(blocks)).float().numpy())
        return np.load(found)


class Judge:
    """LDS and its bootstrap over subsets, with the same draws for all scores, so that ratios have intervals too."""

    def __init__(self, truth: GroundTruth, *, n_draws: int = 500) -> None:
        self.masks, self.outputs = truth.masks, truth.outputs.astype(np.float64).mean(0)
        self.draws = np.random.default_rng(0).integers(len(self.masks), size=(n_draws, len(self.masks)))

    def __call__(self, groups: Sequence[np.ndarray]) -> np.ndarray:
        """Return the mean LDS of several score matrices: first of all subsets, then of each draw."""
        values = []
        for scores in groups:
            predictions = predicted_outputs(scores, self.masks)
            rows = [np.arange(len(self.masks)), *self.draws]
            values.append([np.nanmean(spearman(predictions[chosen], self.outputs[chosen])) for chosen in rows])
        return np.mean(values, axis=0)


def as_row(case: str, method: str, values: np.ndarray, *, metric: str = "lds", **fields: float) -> dict[str, Any]:
    """Return a row of results: the value, the interval that the draws give, and the fields that plots need."""
    interval = list(percentile_interval(values[1:].tolist(), 0.95))
    unit = "x" if metric == "lds_ratio" else "Spearman"
    return {
        "case": case,
        "method": method,
        "metric": metric,
        "value": float(values[0]),
        "unit": unit,
        "interval": interval,
        **fields,
    }
