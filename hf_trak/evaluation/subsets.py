"""Subset retraining: the outputs of models trained on random parts of a training set, as a job that can be stopped and shared.

A folder holds one job:

job.json                                   what is computed; a folder begun as another job is refused
runs/subset-00003-seed-001.parquet         the outputs of one run on the queries; written last, atomically
checkpoints/subset-00003-seed-001/epoch-0004/    weights, where they are kept
log.jsonl                                  CPU and wall seconds of each run; not part of the result

A run depends on its subset and seed alone, so that a stopped job, or one shared by any number of processes, ends in the same files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float

from hf_trak.evaluation.training import Recipe, Rows, outputs_on, save_checkpoint, train
from hf_trak.hashing import hash_json, random_bits, stream_key
from hf_trak.messages import list_differences
from hf_trak.runtime import Bar
from hf_trak.storage.columns import to_table
from hf_trak.storage.files import read_json, write_atomically, write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.tasks import Task

JOB_NAME = "job.json"


def make_masks(n_train: int, n_subsets: int, alpha: float = 0.5, seed: int = 0) -> Bool[np.ndarray, "n_subsets n_train"]:
    """Return random subsets of exactly `round(alpha * n_train)` examples each.

    Subset i depends on `seed` and i alone, not on `n_subsets`: a job can be extended.

    Raises:
        ValueError: If there would be no subset, or nothing in one.
    """
    if n_subsets < 1:
        raise ValueError(f"`n_subsets` must be at least 1, but is {n_subsets}.")
    size = round(alpha * n_train)
    if not (0 < alpha <= 1 and size >= 1):
        raise ValueError(f"`alpha` must be above 0 and at most 1, and leave an example, but is {alpha} of {n_train} examples.")
    masks = np.zeros((n_subsets, n_train), dtype=bool)
    for subset in range(n_subsets):
        order = random_bits(stream_key("subset", seed, subset), torch.arange(n_train)).argsort()
        masks[subset, order[:size].numpy()] = True
    return masks


@dataclass(frozen=True)
class Run:
    """One training run of a job."""

    subset: int
    seed: int

    @property
    def name(self) -> str:
        return f"subset-{self.subset:05d}-seed-{self.seed:03d}"


class SubsetJob:
    """Trains a fresh model on each subset, several times, and records its outputs on the queries.

    Args:
        folder (`Path`): Where the job lives.
        masks (`np.ndarray`): The subsets, (n_subsets, n_train).
        n_seeds (`int`): Runs per subset.
        recipe (`Recipe`): How a run trains.
        identity (`dict`): What else decides the outputs (model, data), as JSON; compared when a folder is gone on with.
        keep_epochs (`int`): Save the weights at the end of the last so many epochs of each run; 0 saves none.
        overwrite (`bool`): Set another job that the folder holds aside, in `replaced-1`, `replaced-2`, ...; nothing is deleted.

    Raises:
        ValueError: If the folder was begun as another job; the message lists what differs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        masks: Bool[np.ndarray, "n_subsets n_train"],
        n_seeds: int,
        recipe: Recipe,
        identity: dict[str, Any],
        keep_epochs: int = 0,
        overwrite: bool = False,
    ) -> None:
        if n_seeds < 1:
            raise ValueError(f"`n_seeds` must be at least 1, but is {n_seeds}.")
        if not 0 <= keep_epochs <= recipe.epochs:
            raise ValueError(f"`keep_epochs` must lie in 0 to {recipe.epochs}, the epochs, but is {keep_epochs}.")
        self.folder = folder
        self.masks = masks
        self.n_seeds = n_seeds
        self.recipe = recipe
        self.keep_epochs = keep_epochs
        self.identity = {
            **identity,
            "n_subsets": len(masks),
            "n_train": masks.shape[1],
            "masks": hash_json(np.packbits(masks, axis=1).tolist()),
            "n_seeds": n_seeds,
            "keep_epochs": keep_epochs,
            "recipe": asdict(recipe),
        }
        self._begin(overwrite)

    def _begin(self, overwrite: bool) -> None:
        path = self.folder / JOB_NAME
        if path.exists() and (found := read_json(path)) != json.loads(json.dumps(self.identity)):
            if not overwrite:
                differences = "\n".join(f"  {line}" for line in list_differences(found, self.identity))
                raise ValueError(
                    f"{self.folder} holds another job than this:\n{differences}\nChoose another folder, or pass overwrite=True "
                    "(--overwrite) to replace it."
                )
            self._set_aside()
        elif not path.exists() and self.folder.exists() and any(not name.startswith(".") for name in os.listdir(self.folder)):
            raise ValueError(f"{self.folder} is not empty and holds no job; choose another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, self.identity)  # first of all: another process may be looking at this folder now
        (self.folder / "runs").mkdir(exist_ok=True)

    def _set_aside(self) -> None:
        """Move the files of the job that the folder holds to `replaced-1`, or the next number; its record last, so that a call that was
        stopped meanwhile is repeated."""
        number = 1
        while (self.folder / f"replaced-{number}" / JOB_NAME).exists():
            number += 1
        aside = self.folder / f"replaced-{number}"
        aside.mkdir(exist_ok=True)
        for name in ("runs", "checkpoints", "log.jsonl", JOB_NAME):
            if (self.folder / name).exists():
                os.rename(self.folder / name, aside / name)

    @property
    def runs(self) -> list[Run]:
        """All runs, in a fixed order: a subset's seeds follow each other."""
        return [Run(subset, seed) for subset in range(len(self.masks)) for seed in range(self.n_seeds)]

    def path(self, run: Run) -> Path:
        """Return where a run's outputs lie."""
        return self.folder / "runs" / f"{run.name}.parquet"

    def checkpoint(self, run: Run, epoch: int | None = None) -> Path:
        """Return where a run's weights after `epoch` epochs (by default the last) lie, if they are kept."""
        return self.folder / "checkpoints" / run.name / f"epoch-{epoch or self.recipe.epochs:04d}"

    def missing(self, *, shard: int = 0, n_shards: int = 1) -> list[Run]:
        """Return the runs of one shard that are not done. Which runs a shard has does not depend on what is done."""
        if not 0 <= shard < n_shards:
            raise ValueError(f"The shard must lie in 0 to {n_shards - 1}, but is {shard}.")
        return [run for run in self.runs[shard::n_shards] if not self.path(run).exists()]

    def work(
        self,
        make_model: Callable[[], PreTrainedModel],
        train_rows: Rows,
        query_rows: Rows,
        task: Task,
        *,
        shard: int = 0,
        n_shards: int = 1,
        device: str = "cpu",
        progress: bool = True,
        processing_class: Any = None,
    ) -> None:
        """Do the missing runs of one shard.

        Args:
            make_model (`Callable`): A fresh model each time; what it draws at random follows the run's seed.
            processing_class (*optional*): A tokenizer or image processor, saved beside each checkpoint.
        """
        if len(train_rows) != self.masks.shape[1]:
            raise ValueError(f"The masks are for {self.masks.shape[1]} training rows, but there are {len(train_rows)}.")
        for run in Bar(self.missing(shard=shard, n_shards=n_shards), unit="run", disable=not progress):
            if self.path(run).exists():  # by another process that shares the folder
                continue
            begin, cpu_begin = time.perf_counter(), time.process_time()
            outputs = self._train(run, make_model, train_rows, query_rows, task, device, processing_class)
            write_atomically(self.path(run), partial(pq.write_table, to_table({"outputs": outputs[None]})))
            seconds = {"cpu_s": time.process_time() - cpu_begin, "wall_s": time.perf_counter() - begin}
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"run": run.name, **{key: round(value, 3) for key, value in seconds.items()}}) + "\n")

    def _train(
        self,
        run: Run,
        make_model: Callable[[], PreTrainedModel],
        train_rows: Rows,
        query_rows: Rows,
        task: Task,
        device: str,
        processing_class: Any,
    ) -> Float[np.ndarray, " n_query"]:
        # A subset's runs are as unlike as runs of different subsets: nothing but the subset is common to its seeds.
        seed = stream_key("run", run.subset, run.seed) % 2**63
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make_model().to(device)

            def keep(epoch: int) -> None:
                if epoch > self.recipe.epochs - self.keep_epochs:
                    save_checkpoint(self.checkpoint(run, epoch), model, processing_class)

            subset = np.flatnonzero(self.masks[run.subset]).tolist()
            train(model, train_rows, subset, self.recipe, seed=seed, on_epoch_end=keep)
            outputs = outputs_on(model, query_rows, task)
        if not np.isfinite(outputs).all():
            raise FloatingPointError(f"{run.name}: {int((~np.isfinite(outputs)).sum())} outputs are not finite.")
        return outputs

    def outputs(self) -> Float[np.ndarray, "n_seeds n_subsets n_query"]:
        """Return the outputs of all runs.

        Raises:
            FileNotFoundError: If runs are missing.
        """
        if missing := self.missing():
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.runs)} runs of {self.folder} are missing, the first {missing[0].name}; run the same "
                "command again to go on."
            )
        return self.outputs_of(range(len(self.masks)))

    def outputs_of(self, subsets: Sequence[int]) -> Float[np.ndarray, "n_seeds n_subsets n_query"]:
        """Return the outputs of some subsets, all of whose runs are done."""
        rows = [[_read_outputs(self.path(Run(subset, seed))) for subset in subsets] for seed in range(self.n_seeds)]
        return np.asarray(rows, dtype=np.float32)

    def save(self) -> Path:
        """Write a finished job as one Parquet file, and return where it lies.

        Raises:
            FileNotFoundError: If runs are missing.
        """
        path = self.folder / f"{self.folder.name}.parquet"
        dataset = collect(self)
        write_atomically(path, lambda temporary: dataset.to_parquet(str(temporary)))
        return path


def _read_outputs(path: Path) -> Float[np.ndarray, " n_query"]:
    return pq.read_table(path).column("outputs").combine_chunks().flatten().to_numpy()


def collect(job: SubsetJob) -> Dataset:
    """Return a finished job as a Dataset: one row per run, with `subset`, `seed`, `mask` and `outputs`."""
    from datasets import Dataset, Features, List, Value

    outputs = job.outputs()
    columns = {
        "subset": [run.subset for run in job.runs],
        "seed": [run.seed for run in job.runs],
        "mask": [job.masks[run.subset] for run in job.runs],
        "outputs": [outputs[run.seed, run.subset] for run in job.runs],
    }
    features = {
        "subset": Value("int32"),
        "seed": Value("int32"),
        "mask": List(Value("bool"), length=job.masks.shape[1]),
        "outputs": List(Value("float32"), length=outputs.shape[2]),
    }
    return Dataset.from_dict(columns, features=Features(features))


class GroundTruth(NamedTuple):
    """What scores are compared with: [`lds`] takes its fields."""

    masks: Bool[np.ndarray, "n_subsets n_train"]
    outputs: Float[np.ndarray, "n_seeds n_subsets n_query"]


def ground_truth_from(dataset: Dataset) -> GroundTruth:
    """Return the masks and outputs of a Dataset that [`collect`] made, whatever the order of its rows.

    Raises:
        ValueError: If a column, or a seed of a subset, is missing; if rows differ in length; or if seeds of a subset have masks of
            their own.
    """
    absent = [name for name in ("subset", "seed", "mask", "outputs") if name not in dataset.column_names]
    if absent:
        raise ValueError(f"A ground truth has the columns subset, seed, mask and outputs; {', '.join(absent)} is missing.")
    columns = dataset.with_format("numpy")[:]
    subsets, seeds = columns["subset"], columns["seed"]
    n_subsets, n_seeds = len(np.unique(subsets)), len(np.unique(seeds))
    if len(set(zip(subsets.tolist(), seeds.tolist(), strict=True))) != len(subsets) or n_subsets * n_seeds != len(subsets):
        raise ValueError(
            f"Expected each of {n_seeds} seeds once for each of {n_subsets} subsets, but there are {len(subsets)} rows."
        )
    for name in ("mask", "outputs"):
        if columns[name].ndim != 2:
            raise ValueError(f"Expected as many numbers in every row of the column {name}, but its rows differ in length.")
    order = np.lexsort((subsets, seeds))
    outputs = columns["outputs"][order].reshape(n_seeds, n_subsets, -1)
    masks = columns["mask"][order].reshape(n_seeds, n_subsets, -1)
    other = np.flatnonzero((masks != masks[0]).any((0, 2)))
    if len(other):
        raise ValueError(
            f"The seeds of a subset must share its mask, but those of {len(other)} subsets do not: these are several jobs."
        )
    return GroundTruth(masks[0].astype(bool), outputs.astype(np.float32))
