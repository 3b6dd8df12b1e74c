"""Scores of the held-out pairs by every method: ensembles of TRAK, TracIn, similarities of embeddings, and at random."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from hf_trak.evaluation.baselines import PairSimilarity, TracInCP
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments
from hf_trak.evaluation.contrastive.workspace import Workspace
from hf_trak.evaluation.subsets import make_masks
from hf_trak.storage.files import write_atomically

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
