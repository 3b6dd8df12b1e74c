"""The evaluation on image-caption pairs: scores by every method, LDS, and counterfactual removals, in one folder of work.

```
models/           what scores are made of: the members of the ensembles, and the checkpoints of one run
ensemble_1/, ...  the indices
scores.safetensors
lds/              outputs of models of random halves, one file per run
counterfactuals/  cosines after removals, one file per run
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from clip_training import NOT_SHARED, ContrastiveArguments, Projections, Trained, WholeEncoder
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_trak.config import TrakConfig
from hf_trak.evaluation.baselines import Checkpoints, PairSimilarity, TracInCP
from hf_trak.evaluation.baselines.representation import embed_pairs
from hf_trak.evaluation.counterfactual import (
    Counterfactuals,
    bootstrap_interval,
    outputs_of_targets,
    run_counterfactuals,
    summarize_counterfactuals,
)
from hf_trak.evaluation.lds import ground_truth_reliability, lds
from hf_trak.evaluation.subsets import make_masks
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.index import AttributionIndex
from hf_trak.messages import list_differences
from hf_trak.storage.files import read_json, write_atomically, write_json


class Workspace:
    """One evaluation in one folder.

    Raises:
        ValueError: If the folder was begun with other settings.
    """

    def __init__(self, args: ContrastiveArguments) -> None:
        self.args = args
        self.folder = Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        _begin(self.folder / "settings.json", args)
        kind: Callable[..., Trained] = Projections if args.model is None else WholeEncoder
        self.trained = kind(args, self.folder)
        self.n_train, self.n_query = len(self.trained.train_rows), len(self.trained.query_rows)
        self.everything = np.ones(self.n_train, dtype=bool)

    @property
    def config(self) -> TrakConfig:
        """What features mean."""
        return replace(self.trained.config, proj_dim=self.args.proj_dim, bank_size=self.args.bank_size)

    @property
    def batch_size(self) -> int | str:
        """Rows of a batch of gradients."""
        size = self.args.featurize_batch_size
        return int(size) if size.isdigit() else size

    def models(self, name: str, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[Any]:
        """Return the models of `keep` epochs of a training run, doing it once."""
        paths = self._paths(name, keep)
        if not self.has_models(name, keep):
            for model, path in zip(self.trained.train(mask, seed, keep=keep), paths, strict=True):
                self.trained.save(model, path)
        return [self.trained.load(path) for path in paths]

    def has_models(self, name: str, keep: int = 1) -> bool:
        """Return whether a training run is done."""
        return self._paths(name, keep)[-1].exists()  # which is saved last

    def _paths(self, name: str, keep: int) -> list[Path]:
        return [self.folder / "models" / name / f"checkpoint_{number}" for number in range(keep)]

    def checkpoints(self, model: Any) -> Checkpoints:
        """Return one model as baselines take it."""
        return Checkpoints(
            model,
            self.config,
            self.trained.processing_class,
            task=self.trained.task,
            batch_size=self.batch_size,
            device=self.args.device,
        )

    def index(
        self,
        name: str,
        models: list[Any],
        *,
        masks: Bool[np.ndarray, "n_models n_train"] | None = None,
        sketch_seed: int = 0,
    ) -> AttributionIndex:
        """Return the index of some models."""
        return AttributionIndex.build(
            self.folder / name,
            models=models,
            dataset=self.trained.train_rows,
            config=replace(self.config, sketch_seed=sketch_seed),
            processing_class=self.trained.processing_class,
            task=self.trained.task,
            masks=None if masks is None else torch.from_numpy(masks),
            batch_size=self.batch_size,
        )

    def embeddings(self, model: Any) -> tuple[Float[Tensor, "n_query dim"], Float[Tensor, "n_query dim"]]:
        """Return those of the held-out images and captions."""
        checkpoints = self.checkpoints(model)
        found = embed_pairs(checkpoints, checkpoints.featurizer(0, sketched=False), self.trained.query_rows)
        return torch.from_numpy(found["images"]), torch.from_numpy(found["captions"])

    def cosines(self, model: Any) -> Float[np.ndarray, " n_query"]:
        """Return the cosine between each held-out image and its caption."""
        return torch.cosine_similarity(*self.embeddings(model)).numpy()

    def outputs(self, model: Any) -> Float[np.ndarray, " n_query"]:
        """Return the output f of every held-out pair, against the bank of the model."""
        checkpoints = self.checkpoints(model)
        featurizer = checkpoints.featurizer(0, sketched=False)
        featurizer.make_bank(self.trained.train_rows)
        return checkpoints.run(featurizer, self.trained.query_rows, lambda batch: _outputs(featurizer, batch))["output"]


@torch.no_grad()
def _outputs(featurizer: Featurizer, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    with evaluation_mode(featurizer.model):
        return {"output": featurizer.task.output_function(featurizer.model, batch)[0].float().cpu().numpy()}


def _begin(path: Path, args: ContrastiveArguments) -> None:
    wanted = json.loads(json.dumps({name: value for name, value in asdict(args).items() if name not in NOT_SHARED}))
    if not path.exists():
        write_json(path, wanted)
    if (found := read_json(path)) != wanted:
        differences = "\n".join(f"  {line}" for line in list_differences(found, wanted))
        raise ValueError(f"{path.parent} was begun with other settings:\n{differences}\nChoose another folder.")


LDS_MASKS_SEED = 2
SINGLE, RANDOM = "TRAK, 1 checkpoint", "random"
_STEPS_SEED = 1000

Scores = dict[str, Float[np.ndarray, "n_train n_query"]]
"""By method."""


class Ensemble(NamedTuple):
    """Members that share no half, run or sketch with another ensemble's."""

    number: int
    masks: Bool[np.ndarray, "n_members n_train"]

    def seed(self, member: int) -> int:
        """Return the seed of a member's training."""
        return 2000 + 1000 * self.number + member

    @property
    def sketch_seed(self) -> int:
        """Of the first member; the others count on."""
        return 1000 * self.number

    def run(self, member: int) -> str:
        """Return the name of a member's run."""
        return f"ensemble_{self.number + 1}-member_{member}"


def ensembles(space: Workspace) -> list[Ensemble]:
    """Return the ensembles; the subsets of LDS have a seed that none of their masks has."""
    seeds = range(1, 1 + 2 * space.args.n_ensembles, 2)
    return [Ensemble(number, make_masks(space.n_train, space.args.n_members, seed=seed)) for number, seed in enumerate(seeds)]


def ensemble_names(args: ContrastiveArguments) -> list[str]:
    """Return what results call the ensembles."""
    name = f"TRAK, {args.n_members} half-subset members"
    return [name, *(f"{name}, ensemble {number + 1}" for number in range(1, args.n_ensembles))]


class Job(NamedTuple):
    """One training run that scores are made of."""

    name: str
    mask: Bool[np.ndarray, " n_train"]
    seed: int
    keep: int = 1


def jobs(space: Workspace) -> list[Job]:
    """Return the run that TracIn looks at, and those of the members of all ensembles."""
    members = [
        Job(ensemble.run(member), mask, ensemble.seed(member))
        for ensemble in ensembles(space)
        for member, mask in enumerate(ensemble.masks)
    ]
    return [Job("steps", space.everything, _STEPS_SEED, space.args.n_checkpoints), *members]


def train_for_scores(space: Workspace) -> None:
    """Train this shard's part of the models that scores are made of."""
    number, n_shards = space.args.shard
    for job in tqdm(jobs(space)[number::n_shards], desc="Models for scores"):
        space.models(*job[:3], keep=job.keep)


def all_scores(space: Workspace) -> Scores | None:
    """Return the scores of every method, made by the first shard of all shards' models; None while one has to be waited for."""
    path = space.folder / "scores.safetensors"
    if not path.exists():
        if space.args.shard_index > 0 or not all(space.has_models(job.name, job.keep) for job in jobs(space)):
            return None
        scores = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in compute_scores(space).items()}
        write_atomically(path, partial(save_file, scores))
    found = load_file(path)
    first = [*ensemble_names(space.args), SINGLE]
    order = [*first, *sorted(set(found) - {*first, RANDOM}), RANDOM]
    return {name: found[name].numpy().astype(np.float64) for name in order}


def compute_scores(space: Workspace) -> Scores:
    """Score the held-out pairs by every method."""
    train, queries = space.trained.train_rows, space.trained.query_rows
    steps = space.models("steps", space.everything, _STEPS_SEED, keep=space.args.n_checkpoints)
    scores = {
        name: _ensemble_scores(space, ensemble)
        for name, ensemble in zip(ensemble_names(space.args), ensembles(space), strict=True)
    }
    last = space.checkpoints(steps[-1])
    return {
        **scores,
        SINGLE: space.index("single", steps[-1:]).score(queries),
        f"TracIn, {len(steps)} checkpoints": _tracin(space, steps),
        "similarity of images": PairSimilarity(last, "images")(train, queries),
        "similarity of captions": PairSimilarity(last, "captions")(train, queries),
        "similarity, mean of both": PairSimilarity(last, "mean")(train, queries),
        RANDOM: np.random.default_rng(0).normal(size=(space.n_train, space.n_query)),
    }


def _ensemble_scores(space: Workspace, ensemble: Ensemble) -> np.ndarray:
    models = [space.models(ensemble.run(member), mask, ensemble.seed(member))[-1] for member, mask in enumerate(ensemble.masks)]
    name = f"ensemble_{ensemble.number + 1}"
    index = space.index(name, models, masks=ensemble.masks, sketch_seed=ensemble.sketch_seed)
    return np.asarray(index.score(space.trained.query_rows))


def _tracin(space: Workspace, steps: list[Any]) -> np.ndarray:
    """Return dot products of the gradients of the contrastive loss, one checkpoint in memory at a time."""
    total = np.zeros((space.n_train, space.n_query))
    for number, model in enumerate(steps):
        epoch = (number + 1) / len(steps)
        rate = 0.5 * (1 + math.cos(math.pi * (epoch - 0.5 / len(steps))))  # of the schedule, midway to this checkpoint
        baseline = TracInCP(space.checkpoints(model), learning_rates=[rate])
        total += baseline(space.trained.train_rows, space.trained.query_rows)
    return total


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


def run_contrastive(args: ContrastiveArguments) -> list[dict[str, Any]] | None:
    """Do what is not done yet, and return the result rows; None while another shard still has something to do.

    Scores are made by the first shard, of models that all shards train. A shard that has to wait returns: the same call later goes on
    with the removals.
    """
    space = Workspace(args)
    truth = GroundTruth(space)
    truth.train()
    train_for_scores(space)
    scores = all_scores(space)
    if scores is None:
        return None
    removals = Removals(space, scores)
    removals.train()
    if not (truth.is_complete and removals.is_complete):
        return None
    return [*lds_rows(truth, scores), *removals.rows(), recall_row(space)]
