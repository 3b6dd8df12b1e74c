"""Forgetting: take away the abstracts that a method credits most for facts that fine-tuning taught, fine-tune again, and ask again.

Facts share runs: for each batch of facts, method, k and seed, the union of each fact's k highest-scored abstracts is removed. A fact
is forgotten if it is answered right with nothing removed, by the run of the same seed, and wrong now. The controls are runs with
nothing removed, with k random abstracts per fact, and with all proponents of the ground truth.

Sources: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), section 5; the shared runs are those of catt-bench
(`catt-bench/mt5-small-ftrace-retrain` on the Hub).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from hf_trak.evaluation.counterfactual import bootstrap_interval
from hf_trak.hashing import hash_json
from hf_trak.messages import list_differences
from hf_trak.runtime import Bar
from hf_trak.storage.files import write_json

NOTHING, RANDOM, GROUND_TRUTH = "nothing removed", "random", "ground truth"


class Answers(NamedTuple):
    """What a model says to every target fact."""

    right: Bool[np.ndarray, " n_targets"]
    output: Float[np.ndarray, " n_targets"]


Retrain = Callable[[Bool[np.ndarray, " n_train"], int], Answers]
"""`(mask, seed) -> answers`: fine-tune on the abstracts where `mask` is True, and ask for every target fact."""


@dataclass(frozen=True)
class Removal:
    """One run: what is removed, and for which batch of facts; the run with nothing removed serves all."""

    method: str
    batch: int | None
    k: int
    seed: int
    removed: Int64[np.ndarray, " n_removed"]

    @property
    def file_name(self) -> str:
        """Return a name that is readable, and different for different runs."""
        slug = "".join(letter if letter.isalnum() else "-" for letter in self.method)
        batch = "" if self.batch is None else f"-batch_{self.batch}"
        return f"{slug}-{hash_json(self.method)[:6]}{batch}-k_{self.k}-seed_{self.seed}.json"


@dataclass(frozen=True, eq=False)
class Forgetting:
    """What is to be removed for whom, and how often.

    Args:
        scores (`Mapping[str, np.ndarray]`): Of every abstract for every target fact, by method.
        proponents (`Sequence[np.ndarray]`): The abstracts that state each target fact.
        top_k (`Sequence[int]`): How many abstracts to remove per fact.
        seeds (`Sequence[int]`): Of fine-tuning; facts must not have been chosen by what these runs learn.
        batch_size (`int`): Facts that share a run.
        case (`str`): What model and data these are; recorded with every run.

    Raises:
        ValueError: If scores differ in shape or hold NaN, or nothing would be left to train on.
    """

    scores: Mapping[str, Float[np.ndarray, "n_train n_targets"]]
    proponents: Sequence[Int64[np.ndarray, " n_proponents"]]
    top_k: Sequence[int] = (5, 20, 100)
    seeds: Sequence[int] = (0, 1, 2)
    batch_size: int = 50
    case: str = ""

    def __post_init__(self) -> None:
        shapes = {method: scores.shape for method, scores in self.scores.items()}
        if len(set(shapes.values())) != 1 or self.n_targets != len(self.proponents):
            raise ValueError(
                f"Expected scores of one shape (n_train, {len(self.proponents)}), one column per target, but got {shapes}."
            )
        for method, scores in self.scores.items():
            if np.isnan(scores).any():
                raise ValueError(f"{int(np.isnan(scores).sum())} scores of {method} are NaN, so its top k is not defined.")
        for removal in self.removals:
            if len(removal.removed) == self.n_train:
                raise ValueError(f"{removal.file_name} would remove all {self.n_train} abstracts. Use smaller batches, or k.")

    @property
    def n_train(self) -> int:
        """Return the number of abstracts."""
        return next(iter(self.scores.values())).shape[0]

    @property
    def n_targets(self) -> int:
        """Return the number of target facts."""
        return next(iter(self.scores.values())).shape[1]

    @property
    def batches(self) -> list[range]:
        """The target facts that share runs."""
        size = self.batch_size
        return [range(start, min(start + size, self.n_targets)) for start in range(0, self.n_targets, size)]

    @cached_property
    def removals(self) -> list[Removal]:
        """All runs. Those of one seed come together, the control first, so that a stopped job has whole seeds."""
        runs = []
        for seed in self.seeds:
            runs.append(Removal(NOTHING, None, 0, seed, np.zeros(0, dtype=np.int64)))
            for number, batch in enumerate(self.batches):
                runs.append(Removal(GROUND_TRUTH, number, 0, seed, _union(self.proponents[target] for target in batch)))
                for k in self.top_k:
                    drawn = (
                        np.random.default_rng([seed, k, target]).choice(self.n_train, k, replace=False) for target in batch
                    )
                    runs.append(Removal(RANDOM, number, k, seed, _union(drawn)))
                    for method in self.scores:
                        runs.append(Removal(method, number, k, seed, _union(self._order(method, t)[:k] for t in batch)))
        return runs

    def _order(self, method: str, target: int) -> np.ndarray:
        """All abstracts, the highest-scored first; ties keep the order of the abstracts."""
        return np.argsort(-self.scores[method][:, target], kind="stable")


def _union(parts: Any) -> Int64[np.ndarray, " n"]:
    return np.unique(np.concatenate(list(parts))).astype(np.int64)


def run_forgetting(
    plan: Forgetting, retrain: Retrain, folder: str | Path, *, shard: tuple[int, int] = (0, 1), progress: bool = True
) -> None:
    """Do every run that `folder` does not hold yet, one small file each; stopped at any moment, the same call goes on.

    Args:
        shard (`tuple[int, int]`): Do every `shard[1]`-th run from `shard[0]` on, where several processes share the work.

    Raises:
        ValueError: If `folder` holds a result of other removals.
    """
    number, n_shards = shard
    if not 0 <= number < n_shards:
        raise ValueError(f"`shard` must be (number, how many) with 0 <= number < how many, but is {shard}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in plan.removals[number::n_shards] if _read(plan, run, folder) is None]
    for run in Bar(missing, unit="run", desc="Retraining", disable=not progress):
        mask = np.ones(plan.n_train, dtype=bool)
        mask[run.removed] = False
        right, output = retrain(mask, run.seed)
        if right.shape != (plan.n_targets,) or output.shape != (plan.n_targets,):
            raise ValueError(
                f"`retrain` must answer {plan.n_targets} facts, but returned shapes {right.shape}, {output.shape}."
            )
        answers = {"right": [bool(value) for value in right], "output": [float(value) for value in output]}
        write_json(folder / run.file_name, {**_identity(plan, run), **answers})


def summarize_forgetting(plan: Forgetting, folder: str | Path) -> list[dict[str, Any]]:
    """Return result rows per method and k: the share of known facts that are forgotten, and the mean change of the output.

    The first method's change is also compared with every other's at the same k, fact by fact: below 0, its removals hurt more.
    Intervals are 95 % bootstrap intervals over facts, of means over seeds.

    Raises:
        FileNotFoundError: If runs are missing.
    """
    found = {(run.method, run.batch, run.k, run.seed): _read(plan, run, Path(folder)) for run in plan.removals}
    missing = [run.file_name for run in plan.removals if found[run.method, run.batch, run.k, run.seed] is None]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(found)} runs are missing in {folder}, such as {missing[0]}; run again."
        )
    groups = [(GROUND_TRUTH, 0), *((method, k) for method in (*plan.scores, RANDOM) for k in plan.top_k)]
    rows, changes = [], {}
    for method, k in groups:
        forgotten, change = _per_fact(plan, found, method, k)
        changes[method, k] = change
        removed = [len(run.removed) for run in plan.removals if (run.method, run.k) == (method, k)]
        more = {"top_k": k or None, "n_removed": float(np.mean(removed)), "n_seeds": len(plan.seeds)}
        if (known := ~np.isnan(forgotten)).any():
            rows.append(_row(plan, method, "forgotten_share", forgotten[known], "share", more))
        rows.append(_row(plan, method, "counterfactual_delta", change, "output", more))
    first = next(iter(plan.scores))
    for method, k in groups:
        if method not in (first, GROUND_TRUTH):
            versus = changes[first, k] - changes[method, k]
            more = {"top_k": k, "n_seeds": len(plan.seeds)}
            rows.append(_row(plan, f"{first} over {method}", "counterfactual_delta_ahead", versus, "output", more))
    return rows


def _per_fact(plan: Forgetting, found: Any, method: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Per fact, the share of the seeds that knew it and forget it (NaN if none knew it), and the mean change of its output."""
    forgotten, change = np.full(plan.n_targets, np.nan), np.zeros(plan.n_targets)
    for number, batch in enumerate(plan.batches):
        for target in batch:
            pairs = [(found[NOTHING, None, 0, seed], found[method, number, k, seed]) for seed in plan.seeds]
            losses = [not after.right[target] for before, after in pairs if before.right[target]]
            forgotten[target] = np.mean(losses) if losses else np.nan
            change[target] = np.mean([after.output[target] - before.output[target] for before, after in pairs])
    return forgotten, change


def _row(plan: Forgetting, method: str, metric: str, values: np.ndarray, unit: str, more: dict[str, Any]) -> dict[str, Any]:
    interval = bootstrap_interval(values)
    return {
        "case": plan.case,
        "method": method,
        "metric": metric,
        "value": float(values.mean()),
        "unit": unit,
        "interval": None if interval is None else list(interval),
        "n_targets": len(values),
        **more,
    }


def _identity(plan: Forgetting, run: Removal) -> dict[str, Any]:
    fields = {"method": run.method, "batch": run.batch, "k": run.k, "seed": run.seed}
    return {"case": plan.case, **fields, "n_train": plan.n_train, "removed": hash_json(run.removed.tolist())}


def _read(plan: Forgetting, run: Removal, folder: Path) -> Answers | None:
    path = folder / run.file_name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        right, output = np.array(content.pop("right"), dtype=bool), np.array(content.pop("output"), dtype=np.float64)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run again.") from error
    if lines := list_differences(content, _identity(plan, run)):
        raise ValueError(
            f"{path} holds the result of another run:\n" + "\n".join(f"  {line}" for line in lines) + "\nChoose another folder."
        )
    return Answers(right, output)
