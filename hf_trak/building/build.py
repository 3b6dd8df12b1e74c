"""Build the members of an index: its folder, its checkpoints, and a pass of gradients for each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.checks import TrainingRows, as_chunks
from hf_trak.building.jobs import Job, record_jobs, remove_job_records
from hf_trak.building.passes import Writing, build_pass
from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.distributed import Processes
from hf_trak.featurizing.devices import check_whole
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.members import Ensemble, Pass, PathPoint
from hf_trak.messages import list_differences
from hf_trak.sources.checkpoints import check_is_checkpoint
from hf_trak.sources.path_bases import find_base
from hf_trak.sources.streams import is_stream, read_stream
from hf_trak.storage.files import read_json, remove_leftovers, write_folder, write_json, write_json_once
from hf_trak.storage.format import differences_from, is_index_name, member_folders
from hf_trak.storage.replacing import (
    begin_replacement,
    drop_replacement,
    finish_replacement,
    foreign_names,
    holds_index,
    staging_folder,
)
from hf_trak.storage.writer import recorded_identity, replace_members
from hf_trak.tasks import draw_rows, needs_bank
from hf_trak.tasks.chunks import with_text_column
from hf_trak.tasks.rows import as_stored, check_is_dataset, features_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from hf_trak.tasks import Task, TaskMaker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A training set and what reads it; see [`AttributionIndex.build`]."""

    dataset: Any  # a `Dataset`, or a stream to be read
    processing_class: Any = None
    task: Task | TaskMaker | None = None
    keep_columns: Sequence[str] = ()
    trust_remote_code: bool = False
    n_rows: int | None = None

    def checked(self) -> Source:
        """Return the source with its rows as they are stored; of a stream, as they are read.

        Raises:
            ValueError: If it is no dataset, or has no rows.
        """
        if is_stream(self.dataset) or self.n_rows is not None:
            return replace(self, dataset=read_stream(self.dataset, self.n_rows), n_rows=None).checked()
        check_is_dataset(self.dataset, "`dataset`")
        if len(self.dataset) == 0:
            raise ValueError("The dataset is empty: there is nothing to featurize.")
        return replace(self, dataset=as_stored(self.dataset))


@dataclass(frozen=True)
class Order:
    """What to build: the arguments of [`AttributionIndex.build`], by topic."""

    ensemble: Ensemble
    source: Source
    config: TrakConfig
    writing: Writing

    @classmethod
    def of(cls, models: Any, dataset: Dataset | IterableDataset, config: TrakConfig | None = None, **options: Any) -> Order:
        """Return the order that the arguments of [`AttributionIndex.build`] mean.

        Raises:
            TypeError: If an option is none of them.
        """
        names = {kind: [one.name for one in fields(kind)] for kind in (Ensemble, Source, Writing)}
        if unknown := sorted(set(options) - {name for known in names.values() for name in known}):
            raise TypeError(f"AttributionIndex.build has no argument {', '.join(map(repr, unknown))}.")
        of_ensemble, of_source, of_writing = (
            {name: options[name] for name in known if name in options} for known in names.values()
        )
        return cls(
            Ensemble.of(models, **of_ensemble), Source(dataset, **of_source), config or TrakConfig(), Writing(**of_writing)
        )

    def checked(self) -> Order:
        """Return the order with its rows as they are stored, and the name of their texts where these are to be cut.

        Raises:
            ValueError: If there are no models or no rows, or masks are not of these.
        """
        if not self.ensemble.models:
            raise ValueError("`models` is empty: give at least one checkpoint.")
        source = self.source.checked()
        _check_masks(self.ensemble.masks, n_models=len(self.ensemble.models), n_rows=len(source.dataset))
        return replace(self, source=source, config=with_text_column(self.config, source.dataset))

    def in_chunks(self, featurizer: Featurizer) -> Order:
        """Return the order with a row per chunk where texts are to be cut (`chunk_overlap`)."""
        dataset, keep_columns, documents = as_chunks(
            featurizer.config, featurizer.task.inputs, featurizer.processing_class, self.source.dataset,
            self.source.keep_columns, progress=self.writing.progress,
        )  # fmt: skip
        ensemble = self.ensemble
        if ensemble.masks is not None and documents is not None:
            ensemble = replace(ensemble, masks=ensemble.masks[:, torch.from_numpy(documents)])
        return replace(self, ensemble=ensemble, source=replace(self.source, dataset=dataset, keep_columns=keep_columns))

    def featurizer(self, checkpoint: Checkpoint, plan: Pass, device: torch.device | None = None) -> Featurizer:
        """Return what featurizes the training set in one pass."""
        return Featurizer(
            self.ensemble.models[checkpoint.model],
            self.config,
            self.source.processing_class,
            task=self.source.task,
            seed=plan.seeds,
            dropout_seed=plan.dropout_seed,
            revision=self.ensemble.revision,
            **checkpoint.arguments(),
            trust_remote_code=self.source.trust_remote_code,
            device=device,
        )


def begin_index(folder: Path, config: TrakConfig, n_members: int, *, overwrite: bool, shared: bool = False) -> None:
    """Make sure `folder` is new, or holds this very index, perhaps unfinished.

    Args:
        overwrite (`bool`): If it holds another index, begin this one apart; [`replace_members`] puts it in its place.
        shared (`bool`): Other processes may be beginning it at this moment. Nothing is ever replaced then.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, where an index needs a folder; choose another name.")
    write_folder(folder)
    finish_replacement(folder)
    remove_leftovers(folder, is_index_name, shared=shared)
    if not foreign_names(folder) and write_json_once(folder / CONFIG_NAME, config.to_dict()):
        return
    if not shared:
        _mend_config(folder, config)
    if not holds_index(folder):
        raise ValueError(
            f"{folder} is not empty and holds no {CONFIG_NAME} of an index; choose another folder. What is there is never replaced."
        )
    lines = _differences(config, folder)
    found = len(member_folders(folder))
    if found > n_members:
        lines.append(f"members: {n_members} here, {found} there")
    if lines and not overwrite:
        raise ValueError(
            f"{folder} holds another index:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace it."
        )
    if lines:
        begin_replacement(folder, config.to_dict())
        return
    staging = staging_folder(folder)
    if not shared and not (holds_index(staging) and (not overwrite or read_json(staging / CONFIG_NAME) == config.to_dict())):
        with suppress(OSError):  # it does no harm on a disk that may only be read
            drop_replacement(folder)  # of another index, or of none
    if not shared and read_json(folder / CONFIG_NAME) != config.to_dict():
        write_json(folder / CONFIG_NAME, config.to_dict())


def _mend_config(folder: Path, config: TrakConfig) -> None:
    """Write the configuration of the index in `folder` again if it is damaged or lost, and all members are of this one."""
    members = member_folders(folder)
    try:
        found = TrakConfig.from_pretrained(folder)
        if members and all(_is_of(member, found) for member in members):
            return
    except (ValueError, FileNotFoundError):
        pass
    if members and all(_is_of(member, config) for member in members):
        write_json(folder / CONFIG_NAME, config.to_dict())


def _is_of(member: Path, config: TrakConfig) -> bool:
    """Return whether a member is of an index with this configuration, as far as it tells."""
    try:
        found = recorded_identity(member)
    except ValueError:
        return False
    return found is not None and not differences_from(found, config)


def _differences(config: TrakConfig, folder: Path) -> list[str]:
    """Return how the configuration in `folder` differs from this one; that of another format version differs in that alone."""
    found = read_json(folder / CONFIG_NAME).get("format_version")
    if found != config.format_version:
        return [f"format_version: {config.format_version} here, {found} there"]
    other = TrakConfig.from_pretrained(folder)
    return config.differences(other) or list_differences(other.identity(), config.identity())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of an index: a model, or a point of the path to it.

    Args:
        model (`int`): Its number among the models that were given.
        point (`PathPoint`, *optional*): None for the model itself.
    """

    model: int
    point: PathPoint | None = None

    def arguments(self) -> dict[str, Any]:
        """Return what a [`Featurizer`] is told of the point."""
        if self.point is None:
            return {}
        return {"base": self.point.base, "alpha": self.point.alpha, "base_revision": self.point.revision}


def lay_out_checkpoints(ensemble: Ensemble) -> list[Checkpoint]:
    """Return the checkpoints of an ensemble: of each model, its points in the order of `alpha`, or itself where it has no base.

    Raises:
        FileNotFoundError: If a base is not there.
        ValueError: If one cannot be a model's base.
    """
    checkpoints: list[Checkpoint] = []
    for number, (model, base) in enumerate(zip(ensemble.models, ensemble.bases, strict=True)):
        if base is None:
            checkpoints.append(Checkpoint(number))
            continue
        point = find_base(model, base, revision=ensemble.revision, base_revision=ensemble.base_revision)
        checkpoints += [Checkpoint(number, replace(point, alpha=value)) for value in ensemble.alphas]
    return checkpoints


def build_members(folder: Path, order: Order, by: Processes | Job) -> None:
    """Featurize a dataset for every member of an index.

    Args:
        by ([`Processes`] or [`Job`]): Among which shards are divided, and of which the first does what only one may do; or the job that
            makes only its part of the shards, in a folder that others write to, and leaves it unfinished.
    """
    order = order.checked()
    ensemble = order.ensemble
    for model in ensemble.models:
        if isinstance(model, (str, Path)):  # the last one, too, is looked up before work begins
            check_is_checkpoint(str(model), ensemble.revision)
    checkpoints = lay_out_checkpoints(ensemble)
    passes = ensemble.passes(len(checkpoints), seed=order.config.sketch_seed)
    processes = Processes() if isinstance(by, Job) else by
    for number, plan in enumerate(passes):
        checkpoint = checkpoints[plan.checkpoint]
        if any(one.point is not None for one in checkpoints):
            plan = replace(plan, model=checkpoint.model)
        featurizer = order.featurizer(checkpoint, plan, processes.device)
        check_whole(featurizer.model)
        if number == 0:
            order = order.in_chunks(featurizer)
            ensemble, dataset = order.ensemble, order.source.dataset
        featurizer.check(dataset)
        if number == 0:
            if processes.is_first:
                featurizer.check_first_rows(dataset)
            rows = TrainingRows.of(dataset, featurizer.task, order.source.keep_columns)
            if processes.is_first:
                logger.info("Columns read: %s.", describe_columns(featurizer.task, dataset))
            if needs_bank(featurizer.task):
                # A bank that cannot be is refused before a file is written.
                draw_rows(len(dataset), order.config.bank_size, order.config.bank_seed)
            config = rows.recorded_in(replace(featurizer.config, task=featurizer.task.name))  # with the columns that were found
            n_members = passes[-1].members[-1] + 1
            if isinstance(by, Job):
                begin_index(folder, config, n_members, overwrite=False, shared=True)
                record_jobs(folder, by, n_members)
            elif processes.is_first:
                begin_index(folder, config, n_members, overwrite=order.writing.overwrite)
            processes.wait()
        mask = None if ensemble.masks is None else ensemble.masks[checkpoint.model]
        description = f"Featurizing {number + 1}/{len(passes)}"
        build_pass(folder, plan, featurizer, rows, order.writing, by=by, mask=mask, description=description)
    if not isinstance(by, Job) and processes.is_first:
        if order.writing.overwrite:
            replace_members(folder, n_members)
        remove_job_records(folder)
    processes.wait()  # no process loads the index before it is in its place


def describe_columns(task: Task, dataset: Dataset) -> str:
    """Return which columns of a dataset a task reads, and as what, in words."""
    features: Any = features_of(dataset)
    found = task.columns_read(features)
    parts = [f"{kind} = {', '.join(names) if isinstance(names, list) else names}" for kind, names in found.items()]
    return "; ".join(parts) or "what the task's own collator reads"


def _check_masks(masks: Bool[Tensor, "n_models n_train"] | None, *, n_models: int, n_rows: int) -> None:
    """Check that there is one entry per model and training row.

    Raises:
        ValueError: With both shapes.
    """
    if masks is not None and (masks.dtype != torch.bool or masks.shape != (n_models, n_rows)):
        raise ValueError(
            f"`masks` must be boolean of shape (n_models, n_train), here ({n_models}, {n_rows}), but are {masks.dtype} of "
            f"shape {tuple(masks.shape)}."
        )
