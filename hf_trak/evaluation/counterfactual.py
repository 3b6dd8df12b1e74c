r"""Counterfactuals: take away the training examples that a method credits most for a prediction, train again, and look.

For each target query and each k, the k highest-scored training examples are removed and the model is trained again with several
seeds. Reported are the mean change of the target's output, $f(z; S \setminus \text{top-}k) - f(z; S)$, and the share of targets whose
prediction flips, beside those of k random examples. The better the method, the further the output falls.

Sources: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), section 5; Ilyas et al. (2022),
[Datamodels](https://huggingface.co/papers/2202.00622), on brittle predictions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from hf_trak.evaluation.lds import bootstrap_draws, percentile_interval
from hf_trak.hashing import hash_json
from hf_trak.messages import list_differences
from hf_trak.runtime import Bar
from hf_trak.storage.files import write_json

Retrain = Callable[[Bool[np.ndarray, " n_train"], int], Float[np.ndarray, " n_query"]]
"""`(mask, seed) -> outputs`: train on the examples where `mask` is True, and return the output of every query."""

NOTHING, RANDOM = "nothing removed", "random"
_N_RESAMPLES = 2000


@dataclass(frozen=True)
class Removal:
    """One training run: what is removed, and for whom. Runs without a target serve all of them."""

    method: str
    target: int | None
    k: int
    seed: int
    removed: Int64[np.ndarray, " k"]

    @property
    def file_name(self) -> str:
        """Return a name that is readable, and different for different runs."""
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", self.method)
        if slug != self.method:
            slug += f"-{hash_json(self.method)[:8]}"
        target = "" if self.target is None else f"-target_{self.target}"
        return f"{slug}{target}-k_{self.k}-seed_{self.seed}.json"


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """What is to be removed for whom, and how often.

    Args:
        scores (`Mapping[str, np.ndarray]`): Scores by method, (n_train, n_query) each.
        targets (`Sequence[int]`): Queries to do this for, as columns of the scores. Choose them without looking at the outputs of
            these seeds: those that one run happens to get right fall back in the next, whatever is removed.
        top_k (`Sequence[int]`): How many training examples to remove.
        seeds (`Sequence[int]`): Of training; outputs are averaged over them. Each has its own random examples for the control, which
            are the same for all targets, so that the control costs one run per seed and k.
        case (`str`): What model and data these are; recorded with every run, and in the results.

    Raises:
        ValueError: If scores differ in shape or hold NaN, a target or k is out of range, or a list is empty or repeats itself.
    """

    scores: Mapping[str, Float[np.ndarray, "n_train n_query"]]
    targets: Sequence[int]
    top_k: Sequence[int]
    seeds: Sequence[int] = (0, 1, 2)
    case: str = ""

    def __post_init__(self) -> None:
        shapes = {method: scores.shape for method, scores in self.scores.items()}
        if not shapes or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
            raise ValueError(f"Expected scores of one shape (n_train, n_query) by method, but got {shapes}.")
        for reserved in {NOTHING, RANDOM} & set(shapes):
            raise ValueError(f"{reserved!r} is the control's name; call the method something else.")
        for method, scores in self.scores.items():
            if np.isnan(scores).any():
                raise ValueError(f"{int(np.isnan(scores).sum())} scores of {method} are NaN, so its top k is not defined.")
        _check_choice("targets", self.targets, 0, self.n_query - 1)
        _check_choice("top_k", self.top_k, 1, self.n_train - 1)
        _check_choice("seeds", self.seeds, 0, 2**32 - 1)

    @property
    def n_train(self) -> int:
        """Return the number of training examples."""
        return next(iter(self.scores.values())).shape[0]

    @property
    def n_query(self) -> int:
        """Return the number of queries, targets or not."""
        return next(iter(self.scores.values())).shape[1]

    @cached_property
    def removals(self) -> list[Removal]:
        """All training runs, the controls first."""
        runs = []
        for seed in self.seeds:
            order = np.random.default_rng([seed, self.n_train]).permutation(self.n_train)
            runs.append(Removal(NOTHING, None, 0, seed, order[:0]))
            runs += [Removal(RANDOM, None, k, seed, order[:k]) for k in self.top_k]
        for method, scores in self.scores.items():
            for target in self.targets:
                order = np.argsort(-scores[:, target], kind="stable")
                runs += [Removal(method, target, k, seed, order[:k]) for k in self.top_k for seed in self.seeds]
        return runs


def run_counterfactuals(
    plan: Counterfactuals,
    retrain: Retrain,
    folder: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Train every run that `folder` does not hold yet, one small file each; stopped at any moment, the same call goes on.

    Args:
        retrain (`Callable`): `(mask, seed) -> outputs`.
        shard (`tuple[int, int]`): Do every `shard[1]`-th run from `shard[0]` on, where several processes share the work.
        overwrite (`bool`): Replace the results of other scores, or of another case, that `folder` holds.

    Raises:
        ValueError: If `folder` holds a result of other scores, or `retrain` returns anything but one finite number per query.
    """
    number, n_shards = shard
    if not 0 <= number < n_shards:
        raise ValueError(f"`shard` must be (number, how many) with 0 <= number < how many, but is {shard}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs = plan.removals[number::n_shards]
    missing = [run for run in runs if _read(plan, run, folder, overwrite=overwrite) is None]
    with Bar(total=len(runs), initial=len(runs) - len(missing), unit="runs", desc="Retraining", disable=not progress) as bar:
        for run in missing:
            mask = np.ones(plan.n_train, dtype=bool)
            mask[run.removed] = False
            outputs = _check_outputs(retrain(mask, run.seed), plan, run)
            write_json(folder / run.file_name, {**_identity(plan, run), "outputs": outputs})
            bar.update()


def summarize_counterfactuals(plan: Counterfactuals, folder: str | Path, *, flips: bool = True) -> list[dict[str, Any]]:
    """Return result rows: per method and k, the mean change of the output and the share of flipped predictions.

    Intervals are 95 % bootstrap intervals over targets; with a single target there are none.

    Args:
        flips (`bool`): Whether an output's sign is the prediction. It is for the margin of two classes; with more, the sign says
            whether the label has more than half of the probability. False for outputs whose sign means nothing.

    Raises:
        ValueError: If runs are missing, or are of other scores.
    """
    before, removed = outputs_of_targets(plan, folder)
    rows = []
    for (method, k), after in removed.items():
        measures = {"counterfactual_delta": (after - before, "output")}
        if flips:
            measures["counterfactual_flipped_share"] = (((after > 0) != (before > 0)).astype(float), "share")
        rows += [_row(plan, method, k, metric, values, unit) for metric, (values, unit) in measures.items()]
    return rows


def outputs_of_targets(
    plan: Counterfactuals, folder: str | Path
) -> tuple[Float[np.ndarray, " n_targets"], dict[tuple[str, int], Float[np.ndarray, " n_targets"]]]:
    """Return the targets' outputs with nothing removed, and by method and k after a removal; means over seeds.

    Raises:
        ValueError: If runs are missing, or are of other scores.
    """
    folder = Path(folder)
    found: dict[tuple[str, int | None, int, int], list[float]] = {}
    missing = []
    for run in plan.removals:
        result = _read(plan, run, folder)
        if result is None:
            missing.append(run)
        else:
            found[run.method, run.target, run.k, run.seed] = result
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(plan.removals)} runs are missing in {folder}, such as {missing[0].file_name}. Run the same again to go on."
        )

    def outputs(method: str, k: int) -> np.ndarray:
        shared = method in (NOTHING, RANDOM)
        runs = [[found[method, None if shared else t, k, seed][t] for seed in plan.seeds] for t in plan.targets]
        return np.array(runs).mean(1)

    return outputs(NOTHING, 0), {(method, k): outputs(method, k) for method in (*plan.scores, RANDOM) for k in plan.top_k}


def bootstrap_interval(values: Float[np.ndarray, " n"], *, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean of `values`; None for a single one."""
    if len(values) < 2:
        return None
    rows = bootstrap_draws(np.random.default_rng(seed), len(values), _N_RESAMPLES)
    return percentile_interval(values[rows].mean(1).tolist(), 0.95)


def _row(plan: Counterfactuals, method: str, k: int, metric: str, values: np.ndarray, unit: str) -> dict[str, Any]:
    interval = bootstrap_interval(values)
    return {
        "case": plan.case,
        "method": method,
        "metric": metric,
        "value": float(values.mean()),
        "unit": unit,
        "interval": None if interval is None else list(interval),
        "top_k": k,
        "n_targets": len(plan.targets),
        "n_seeds": len(plan.seeds),
    }


def _identity(plan: Counterfactuals, run: Removal) -> dict[str, Any]:
    return {
        "case": plan.case,
        "method": run.method,
        "target": run.target,
        "k": run.k,
        "seed": run.seed,
        "n_train": plan.n_train,
        "n_query": plan.n_query,
        "removed": hash_json(sorted(run.removed.tolist())),
    }


def _read(plan: Counterfactuals, run: Removal, folder: Path, *, overwrite: bool = False) -> list[float] | None:
    """Return the outputs of a finished run; None if it is not finished, or is another's and may be overwritten."""
    path = folder / run.file_name
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        outputs = [float(output) for output in result.pop("outputs")]
        if len(outputs) != result["n_query"]:
            raise ValueError(f"{len(outputs)} outputs of {result['n_query']}")
        lines = list_differences(result, _identity(plan, run))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). Delete it and run again.") from error
    if lines and overwrite:
        return None
    if lines:
        raise ValueError(
            f"{path} holds the result of another run:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nChoose another folder, or pass overwrite=True to replace such results."
        )
    return outputs


def _check_outputs(outputs: np.ndarray, plan: Counterfactuals, run: Removal) -> list[float]:
    outputs = np.asarray(outputs, dtype=np.float64)
    if outputs.shape != (plan.n_query,):
        raise ValueError(
            f"`retrain` must return one output per query, of shape ({plan.n_query},), but returned shape {outputs.shape}."
        )
    if not np.isfinite(outputs).all():
        raise ValueError(
            f"{int((~np.isfinite(outputs)).sum())} outputs are not finite after training for {run.file_name}: training diverged. "
            "Lower the learning rate; nothing was written for this run."
        )
    return outputs.tolist()


def _check_choice(name: str, values: Sequence[int], low: int, high: int) -> None:
    if len(values) == 0 or len(set(values)) != len(values) or not all(low <= value <= high for value in values):
        raise ValueError(f"`{name}` must be different whole numbers from {low} to {high}, at least one, but is {list(values)}.")
