"""What attributions of pairs are worth: LDS, what removing their top k does, and how good the model itself is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from hf_trak.evaluation.contrastive.scores import LDS_MASKS_SEED, RANDOM, SINGLE, Scores, ensemble_names
from hf_trak.evaluation.contrastive.workspace import Workspace
from hf_trak.evaluation.counterfactual import (
    Counterfactuals,
    bootstrap_interval,
    outputs_of_targets,
    run_counterfactuals,
    summarize_counterfactuals,
)
from hf_trak.evaluation.lds import ground_truth_reliability, lds
from hf_trak.evaluation.subsets import make_masks
from hf_trak.storage.files import read_json, write_json


class GroundTruth:
    """Outputs of models trained on random halves, one file per run."""

    def __init__(self, space: Workspace) -> None:
        self.space, self.folder = space, space.folder / "lds"
        self.masks = make_masks(space.n_train, space.args.n_subsets, seed=LDS_MASKS_SEED)
        self.runs = [(seed, subset) for seed in range(space.args.n_seeds) for subset in range(space.args.n_subsets)]

    def train(self) -> None:
        """Do this shard's runs."""
        number, n_shards = self.space.args.shard
        for seed, subset in tqdm(self.runs[number::n_shards], desc="Ground truth"):
            self._outputs(seed, subset)

    def _outputs(self, seed: int, subset: int) -> list[float]:
        path = self.folder / f"subset_{subset}-seed_{100 * seed + subset}.json"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            model = self.space.trained.train(self.masks[subset], 100 * seed + subset)[-1]
            write_json(path, {"outputs": self.space.outputs(model).tolist()})
        return list(read_json(path)["outputs"])

    @property
    def is_complete(self) -> bool:
        """Whether all shards' runs are there."""
        return len(list(self.folder.glob("*.json"))) >= len(self.runs)

    def outputs(self) -> Float[np.ndarray, "n_seeds n_subsets n_query"]:
        """Return the outputs of all runs."""
        found = np.array([self._outputs(seed, subset) for seed, subset in self.runs])
        return found.reshape(self.space.args.n_seeds, self.space.args.n_subsets, -1)


def lds_rows(truth: GroundTruth, scores: Scores) -> list[dict[str, Any]]:
    """Return the LDS of every method, of the ensembles of TRAK on average, and its ceiling."""
    args, outputs = truth.space.args, truth.outputs()
    found = {name: lds(values, truth.masks, outputs) for name, values in scores.items()}
    if args.n_ensembles > 1:  # beside each other, as so many more queries: their mean, with an interval of its own
        beside = np.concatenate([scores[name] for name in ensemble_names(args)], axis=1)
        found[_mean_name(truth.space)] = lds(beside, truth.masks, np.concatenate([outputs] * args.n_ensembles, axis=2))
    ceiling = ground_truth_reliability(outputs)
    values = [(name, "lds", result.value, result.interval) for name, result in found.items()]
    values.append(("noiseless outputs", "lds_ceiling", ceiling.ceiling, ceiling.interval))
    case = f"{truth.space.trained.case}, {args.n_subsets} half-subsets x {args.n_seeds} seeds"
    return [
        {"case": case, "method": method, "metric": metric, "value": value, "unit": "", "interval": list(interval)}
        for method, metric, value, interval in values
    ]


class Removals:
    """Training again without the top k of each method, for some of the held-out pairs."""

    def __init__(self, space: Workspace, scores: Scores) -> None:
        args = space.args
        self.space, self.folder = space, space.folder / "counterfactuals"
        self.plan = Counterfactuals(
            # The plan has a random control of its own, and one checkpoint would cost as many runs as twenty.
            {name: values for name, values in scores.items() if name not in (RANDOM, SINGLE)},
            targets=sorted(np.random.default_rng(0).permutation(space.n_query)[: args.n_targets].tolist()),
            top_k=args.top_k,
            seeds=range(args.n_seeds),
            case=space.trained.case,
        )

    def train(self) -> None:
        """Do this shard's runs."""
        run_counterfactuals(self.plan, self._retrain, self.folder, shard=self.space.args.shard)

    def _retrain(self, mask: np.ndarray, seed: int) -> np.ndarray:
        return self.space.cosines(self.space.trained.train(mask, seed)[-1])

    @property
    def is_complete(self) -> bool:
        """Whether all shards' runs are there."""
        return all((self.folder / run.file_name).exists() for run in self.plan.removals)

    def rows(self) -> list[dict[str, Any]]:
        """Return the change of the targets' cosines, by method and k, and of the ensembles of TRAK on average."""
        rows = summarize_counterfactuals(self.plan, self.folder, flips=False)
        if self.space.args.n_ensembles > 1:
            rows += self._means(rows)
        return [{**row, "unit": "cosine"} for row in rows]

    def _means(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        before, removed = outputs_of_targets(self.plan, self.folder)
        names, means = ensemble_names(self.space.args), []
        for row in rows:
            if row["method"] == names[0]:
                deltas = np.mean([removed[name, row["top_k"]] - before for name in names], axis=0)
                interval = bootstrap_interval(deltas)
                found = {"value": float(deltas.mean()), "interval": None if interval is None else list(interval)}
                means.append({**row, "method": _mean_name(self.space), **found})
        return means


def _mean_name(space: Workspace) -> str:
    return f"{ensemble_names(space.args)[0]}, mean of {space.args.n_ensembles} ensembles"


def recall_row(space: Workspace) -> dict[str, Any]:
    """Return how often a model of all pairs finds a held-out image's caption first, so that one knows what is attributed."""
    images, texts = space.embeddings(space.models("recall", space.everything, 0)[-1])
    images, texts = (torch.nn.functional.normalize(rows, dim=1) for rows in (images, texts))
    value = (images @ texts.T).argmax(1).eq(torch.arange(space.n_query)).double().mean().item()
    row = {"case": space.trained.case, "method": "the model itself", "metric": "recall_at_1"}
    return {**row, "value": value, "unit": "share", "interval": None}
