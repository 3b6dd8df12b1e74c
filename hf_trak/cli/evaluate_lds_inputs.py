"""What `hf-trak evaluate lds` reads: a ground truth, and the scores of an index, of files and of baselines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from hf_trak import __version__
from hf_trak.cli.data import load_rows
from hf_trak.cli.parsing import rows_at_a_time
from hf_trak.evaluation import GroundTruth, ground_truth_from
from hf_trak.evaluation.baselines import Checkpoints, make_baseline
from hf_trak.featurizing.descriptions import recorded_processor
from hf_trak.index import AttributionIndex
from hf_trak.tasks import import_task

if TYPE_CHECKING:
    from hf_trak.cli.evaluate_lds import LDSArguments


def load_ground_truth(args: LDSArguments) -> GroundTruth:
    """Load subsets and outputs; of a folder that train_subsets.py made, its collected file."""
    name = args.ground_truth
    if (Path(name) / "job.json").is_file():
        collected = Path(name) / f"{Path(name).resolve().name}.parquet"
        if not collected.exists():
            raise FileNotFoundError(f"The job in {name} is not finished: run the same train_subsets.py command again to go on.")
        name = str(collected)
    rows = load_rows(name, split=args.ground_truth_split, config=args.ground_truth_config)
    try:
        truth = ground_truth_from(rows)
    except ValueError as error:
        raise ValueError(f"--ground_truth {args.ground_truth}: {error}") from error
    if len(truth.masks) < 2:
        raise ValueError(f"--ground_truth {args.ground_truth} holds one subset; a correlation needs at least two.")
    return truth


@dataclass
class Inputs:
    """What is scored: an index and its queries, files of scores, and baselines."""

    args: LDSArguments
    truth: GroundTruth
    index: AttributionIndex | None
    queries: Dataset | None
    train: Dataset | None
    checkpoints: Checkpoints | None = None  # shared by the baselines, which keep gradients in it

    @property
    def case(self) -> str:
        """Return what is measured, as results files name it."""
        n_train, n_query = self.truth.masks.shape[1], self.truth.outputs.shape[2]
        sizes = f"{n_train:,} training rows, {n_query:,} queries"
        if self.index is None:
            return f"{Path(self.args.ground_truth).name}: {sizes}"
        model, n_members = self.index.members[0].identity["model_class"], len(self.index.members)
        return f"{self.index.folder.name}: {model}, {sizes}, proj_dim {self.index.config.proj_dim}, {n_members} members"

    def methods(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield names and scores, one after another, so that one matrix at a time is in memory."""
        if self.index is not None:
            yield from self._of_index(self.index)
        for path in self.args.scores or []:
            yield path, read_scores(Path(path), self.truth)
        for name in self.args.baselines or []:
            yield name, self._baseline(name)

    def _of_index(self, index: AttributionIndex) -> Iterator[tuple[str, np.ndarray]]:
        dampings: list[str | None] = [*self.args.damping] if self.args.damping else [None]
        for damping in dampings:
            given = index.config.damping if damping is None else replace(index.config, damping=damping).damping  # type: ignore[arg-type]
            value = index.resolve_damping(given)
            auto = " (auto)" if given == "auto" else ""
            scores = index.score(self.queries, damping=value, batch_size=_rows_at_a_time(self.args))
            yield f"hf_trak {__version__}, damping {value:g}{auto}", scores

    def _baseline(self, name: str) -> np.ndarray:
        if name == "random":  # of any rows, as many as there are
            train, queries = (
                Dataset.from_dict({"row": range(n)}) for n in (self.truth.masks.shape[1], self.truth.outputs.shape[2])
            )
            return make_baseline(name)(train, queries)
        assert self.index is not None
        if self.checkpoints is None:
            models = checkpoints_of(self.index)
            self.checkpoints = Checkpoints(
                models,
                self.index.config,
                processing_class=self.args.processor or recorded_processor(self.index.folder, self.index.members[0].info),
                task=self.index.task,
                batch_size=_rows_at_a_time(self.args),
            )
        return make_baseline(name, self.checkpoints)(self.train, self.queries)


def checkpoints_of(index: AttributionIndex) -> list[Any]:
    """Return the checkpoints an index was made of, in order, as baselines take them."""
    found = {}
    for plan in index.passes:
        if plan.checkpoint not in found:
            featurizer = index.featurizer(plan.members[0])  # refuses weights that are not those recorded
            by_name = featurizer.source is not None and featurizer.revision is None and featurizer.point is None
            found[plan.checkpoint] = featurizer.source if by_name else featurizer.model
    return list(found.values())


def _rows_at_a_time(args: LDSArguments) -> int | str:
    return rows_at_a_time(args.batch_size, "--batch_size")


def read_scores(path: Path, truth: GroundTruth) -> np.ndarray:
    """Map a `.npy` file of scores to memory.

    Raises:
        ValueError: If it is no such file, or is not of the ground truth's rows and queries.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--scores: there is no file {path}.")
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--scores: {path} is not an array of numbers that numpy.save wrote: {error}") from error
    expected = truth.masks.shape[1], truth.outputs.shape[2]
    if not isinstance(scores, np.ndarray) or scores.shape != expected:
        shape = getattr(scores, "shape", "of several arrays")
        hint = " They look transposed." if shape == expected[::-1] else ""
        raise ValueError(
            f"--scores: {path} must hold (n_train, n_query) = {expected} numbers, as the ground truth has them, but is {shape}.{hint}"
        )
    return scores


def load_inputs(args: LDSArguments, truth: GroundTruth) -> Inputs:
    """Load what is to be scored, and check that it is what the ground truth is of."""
    n_train, n_query = truth.masks.shape[1], truth.outputs.shape[2]
    loading: dict[str, Any] = {
        "models": args.model,
        "base": args.base,
        "processing_class": args.processor,
        "task": None if args.task is None else import_task(args.task),
        "trust_remote_code": args.trust_remote_code,
    }
    index = None if args.index is None else AttributionIndex.from_pretrained(args.index, revision=args.revision, **loading)
    if index is not None:
        _check_rows("--index", index.n_rows, n_train, "training rows")
    queries = None if args.queries is None else load_rows(args.queries, split=args.split, config=args.queries_config)
    train = None if args.train is None else load_rows(args.train, split=args.train_split, config=args.train_config)
    if queries is not None:
        _check_rows("--queries", len(queries), n_query, "queries")
    if train is not None:
        _check_rows("--train", len(train), n_train, "training rows")
        if index is not None:
            train = index.align(train)
    return Inputs(args, truth, index, queries, train)


def _check_rows(flag: str, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(
            f"{flag} has {found:,} rows, but the ground truth is of {expected:,} {what}. They must be the same rows, in the same order: "
            "train_subsets.py leaves those it used in OUTPUT/data."
        )
