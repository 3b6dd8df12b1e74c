"""Build the members of an index: gradient passes over the training set, by one process, by several, or by one job of an array."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.checks import TrainingRows, as_chunks
from hf_trak.building.jobs import Job, record_jobs, remove_job_records
from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.distributed import Processes
from hf_trak.featurizing.devices import check_whole
from hf_trak.featurizing.engine_choice import EngineChoice
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.identity import describe_featurizer, describe_member, identity_of, library_minors, warn_of_libraries
from hf_trak.featurizing.loop import featurize
from hf_trak.members import Pass, PathPoint, lay_out_passes, read_alphas
from hf_trak.messages import list_differences
from hf_trak.sources.checkpoints import check_is_checkpoint
from hf_trak.sources.path_bases import find_base
from hf_trak.storage.files import read_json, remove_leftovers, write_folder, write_json, write_json_once
from hf_trak.storage.format import BANK_NAME, MEMBER_NAME, STATISTICS_NAME, differences_from, is_index_name, member_folders
from hf_trak.storage.passes import PassWriter, gram_of, keep_stretch, stretches
from hf_trak.storage.replacing import (
    begin_replacement,
    drop_replacement,
    finish_replacement,
    foreign_names,
    holds_index,
    staging_folder,
)
from hf_trak.storage.writer import MemberWriter, recorded_identity, replace_members
from hf_trak.tasks import Bank, draw_rows, needs_bank
from hf_trak.tasks.chunks import with_text_column
from hf_trak.tasks.rows import as_stored, check_is_dataset, features_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.tasks import Task, TaskMaker


def build_pass(
    folder: Path,
    plan: Pass,
    featurizer: Featurizer,
    rows: TrainingRows,
    *,
    processes: Processes,
    mask: Bool[Tensor, " rows"] | None = None,
    batch_size: int | str,
    shard_rows: int,
    overwrite: bool,
    progress: bool,
    description: str,
) -> None:
    """Featurize a dataset once for all members of a pass, going on where an earlier call stopped.

    Every process takes a stretch of the missing shards. The first opens the folder before the others do, and finishes the members
    when all are done.

    Args:
        folder (`Path`): The index.
        mask (`torch.Tensor`, *optional*): Which rows the checkpoint was trained on, to be recorded.
    """
    proj_dim = featurizer.config.proj_dim
    if processes.is_first:
        writers = _open(folder, plan, featurizer, rows, shard_rows, overwrite=overwrite)
        _share(writers, featurizer, rows.dataset)
    processes.wait()
    if not processes.is_first:
        writers = _open(folder, plan, featurizer, rows, shard_rows, overwrite=overwrite, shared=True)
        _share(writers, featurizer, rows.dataset)
    whole = PassWriter(writers, plan.seeds)
    # The first process's view: a network file system may show the others an older one.
    open_members, missing = processes.tell([_unfinished(writers), whole.missing()] if processes.is_first else None)
    if not open_members:
        return
    unfinished = [writers[number] for number in open_members]
    featurize(
        featurizer,
        rows.dataset,
        whole,
        shards=processes.share(missing) if processes.count > 1 else None,
        batch_size=batch_size,
        progress=progress and processes.is_first,
        description=description if processes.count == 1 else f"{description}, 1 of {processes.count} processes",
        speak=processes.is_first,
        check=processes.check,
    )
    processes.wait()
    if processes.count > 1:
        _see_shards(whole)
        for writer, stretch in processes.share([(w, stretch) for w in unfinished for stretch in stretches(w.n_shards)]):
            keep_stretch(writer, stretch, proj_dim=proj_dim)
            processes.check()
        processes.wait()
    if processes.is_first:
        for writer in unfinished:
            writer.finish(gram_of(writer, proj_dim=proj_dim), describe_member(folder, plan, featurizer, rows.dataset), mask)
    processes.wait()


def _unfinished(writers: Sequence[MemberWriter]) -> list[int]:
    return [number for number, writer in enumerate(writers) if not writer.is_finished]


def _see_shards(writer: PassWriter, *, patience: float = 90.0) -> None:
    """Wait until what other processes have written can be seen: network file systems remember for a while what was not there.

    Raises:
        FileNotFoundError: If it cannot.
    """
    until = time.monotonic() + patience
    while missing := writer.missing():
        if time.monotonic() > until:
            raise FileNotFoundError(
                f"Other processes have written shards {', '.join(map(str, missing[:10]))}{', ...' if len(missing) > 10 else ''} to "
                f"{writer.writers[0].folder}, and they are not to be seen by this one. All machines must share that folder; if they "
                "do not, use jobs with --shard-index and --num-shards."
            )
        time.sleep(1.0)


def build_shards_of_pass(
    folder: Path,
    plan: Pass,
    featurizer: Featurizer,
    rows: TrainingRows,
    *,
    part: Job,
    mask: Bool[Tensor, " rows"] | None = None,
    batch_size: int | str,
    shard_rows: int,
    progress: bool,
    description: str,
) -> None:
    """Make a part of a pass's shards, in a folder that other jobs write to at any time, and leave the members unfinished.

    What only this job knows and [`merge_members`] will need is left there, too.
    """
    writers = _open(folder, plan, featurizer, rows, shard_rows, shared=True)
    unfinished = [writer for writer in writers if not writer.is_finished]
    if not unfinished:
        return
    _share(writers, featurizer, rows.dataset)
    for writer in unfinished:
        writer.describe(describe_member(folder, plan, featurizer, rows.dataset), mask)
    featurize(
        featurizer,
        rows.dataset,
        PassWriter(writers, plan.seeds),
        shards=part.share(range(writers[0].n_shards)),
        batch_size=batch_size,
        progress=progress,
        description=f"{description}, part {part.index} of {part.count}",
    )
    for writer in unfinished:
        missing = set(writer.missing())
        for stretch in stretches(writer.n_shards):
            if not missing.intersection(stretch):
                keep_stretch(writer, stretch, proj_dim=featurizer.config.proj_dim)


def _open(
    folder: Path, plan: Pass, featurizer: Featurizer, rows: TrainingRows, shard_rows: int, **options: Any
) -> list[MemberWriter]:
    found = describe_featurizer(featurizer, rows.columns)
    shared = {"config": identity_of(featurizer.config), "dataset": rows.identity(), "libraries": library_minors()}
    config = rows.recorded_in(replace(featurizer.config, task=featurizer.task.name))
    writers = []
    for number, seed in zip(plan.members, plan.seeds, strict=True):
        is_first = number == 0
        identity = {**found, "seed": seed, **shared, **(rows.kept_identity() if is_first else {})}
        writers.append(
            MemberWriter.of_index(
                folder,
                number,
                config.to_dict(),
                identity=_with_recorded_libraries(folder / f"member_{number}", identity),
                n_rows=len(rows.dataset),
                shard_rows=shard_rows,
                beside=rows.all_columns if is_first else rows.digest_column,
                **options,
            )
        )
    return writers


def _with_recorded_libraries(member: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with the libraries that a finished member was made with, so that another version of one does not refuse it.

    An unfinished one is refused, since its rows would be made by two versions.
    """
    if not (member / MEMBER_NAME).exists():
        return identity
    try:
        recorded = read_json(member / MEMBER_NAME).get("identity", {})
    except ValueError:  # damaged: the writer goes by the shards, or refuses
        return identity
    if not isinstance(recorded, dict) or any(
        recorded.get(key) != value for key, value in identity.items() if key != "libraries"
    ):
        return identity  # another member, which is refused or replaced
    warn_of_libraries(member, recorded.get("libraries"))
    return {**identity, "libraries": recorded.get("libraries")}


def _share(writers: Sequence[MemberWriter], featurizer: Featurizer, dataset: Dataset) -> None:
    """Give all members and processes of a pass one of each of what its rows depend on, the first of them first."""
    if all(writer.is_finished for writer in writers):
        return
    statistics = _share_tensors(writers, STATISTICS_NAME, partial(featurizer.measure_statistics, dataset))
    if statistics is not None:
        featurizer.use_statistics(statistics)
    bank = _share_tensors(writers, BANK_NAME, lambda: made.tensors() if (made := featurizer.make_bank(dataset)) else None)
    if bank is not None:
        featurizer.use_bank(Bank.from_tensors(bank))
    _share_engine(writers, featurizer, dataset)


def _share_tensors(
    writers: Sequence[MemberWriter], file: str, make: Callable[[], dict[str, Tensor] | None]
) -> dict[str, Tensor] | None:
    """Return what an earlier call or another process wrote, so that going on gives the same bytes, or what is made and written now."""
    found = next((tensors for writer in writers if (tensors := writer.tensors(file)) is not None), None)
    if found is None:
        made = make()
        if made is None:
            return None
        writers[0].write_tensors(file, made)
        found = writers[0].tensors(file)  # another process may have been first
    assert found is not None
    for writer in writers:
        if writer.tensors(file) is None:
            writer.write_tensors(file, found)
    return found


def _share_engine(writers: Sequence[MemberWriter], featurizer: Featurizer, dataset: Dataset) -> None:
    """Give a pass one engine: the one an earlier call or another process decided on, or the one that the data set's rows decide now.

    Every process checks the same rows of the data set, whichever shards it makes, and goes by what was written first.
    """
    unfinished = [writer for writer in writers if not writer.is_finished]
    found = next((engine for writer in unfinished if (engine := writer.engine()) is not None), None)
    if found is None or found["name"] != "loop":
        chosen = featurizer.choose_engine(dataset)
        if found is None:
            unfinished[0].write_engine(chosen.to_dict())
            found = unfinished[0].engine()  # another process may have been first
    assert found is not None
    featurizer.use_engine(EngineChoice(**found))
    for writer in unfinished:
        writer.write_engine(found)


logger = logging.getLogger(__name__)

Base = str | Path | None


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


def lay_out_checkpoints(
    models: Sequence[PreTrainedModel | str | Path],
    base: Base | Sequence[Base],
    alpha: float | Sequence[float] | None,
    *,
    revision: str | None,
    base_revision: str | None,
) -> list[Checkpoint]:
    """Return the checkpoints that are made of some models: of each, its points in the order of `alpha`, or itself where it has no base.

    Raises:
        FileNotFoundError: If a base is not there.
        ValueError: If there are not as many bases as models, one cannot be a model's base, or `alpha` is out of range.
    """
    bases: list[Any] = list(base) if isinstance(base, (list, tuple)) else [base] * len(models)
    if len(bases) != len(models):
        raise ValueError(
            f"`base` must be one base, or one per model, None for none: {len(models)}, but there are {len(bases)}."
        )
    given = [one for one in bases if one is not None]
    alphas = read_alphas(given[0] if given else None, alpha)
    if base_revision is not None and not given:
        raise ValueError("`base_revision` is given, but there is no `base`.")
    checkpoints: list[Checkpoint] = []
    for number, (model, one) in enumerate(zip(models, bases, strict=True)):
        if one is None:
            checkpoints.append(Checkpoint(number))
            continue
        point = find_base(model, one, revision=revision, base_revision=base_revision)
        checkpoints += [Checkpoint(number, replace(point, alpha=value)) for value in alphas]
    return checkpoints


def build_members(
    folder: Path,
    models: Sequence[PreTrainedModel | str | Path],
    dataset: Dataset,
    config: TrakConfig,
    *,
    processes: Processes,
    part: Job | None = None,
    processing_class: Any,
    task: Task | TaskMaker | None,
    revision: str | None,
    base: Base | Sequence[Base] = None,
    alpha: float | Sequence[float] | None = None,
    base_revision: str | None = None,
    sketch_seeds_per_checkpoint: int,
    dropout_seeds: int,
    masks: Bool[Tensor, "n_models n_train"] | None,
    overwrite: bool,
    keep_columns: Sequence[str] = (),
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Featurize a dataset for every member of an index; see [`AttributionIndex.build`], whose arguments these are.

    Args:
        processes ([`Processes`]): Among which shards are divided, and of which the first does what only one may do.
        part ([`Job`], *optional*): Make only this part of the shards, in a folder that others write to, and leave it unfinished.
    """
    if not models:
        raise ValueError("`models` is empty: give at least one checkpoint.")
    check_is_dataset(dataset, "`dataset`")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is nothing to featurize.")
    dataset = as_stored(dataset)
    config = with_text_column(config, dataset)
    _check_masks(masks, n_models=len(models), n_rows=len(dataset))
    for model in models:
        if isinstance(model, (str, Path)):  # the last one, too, is looked up before work begins
            check_is_checkpoint(str(model), revision)
    checkpoints = lay_out_checkpoints(models, base, alpha, revision=revision, base_revision=base_revision)
    passes = lay_out_passes(
        len(checkpoints),
        seed=config.sketch_seed,
        sketch_seeds_per_checkpoint=sketch_seeds_per_checkpoint,
        dropout_seeds=dropout_seeds,
    )
    for number, plan in enumerate(passes):
        checkpoint = checkpoints[plan.checkpoint]
        if any(one.point is not None for one in checkpoints):
            plan = replace(plan, model=checkpoint.model)
        featurizer = Featurizer(
            models[checkpoint.model],
            config,
            processing_class,
            task=task,
            seed=plan.seeds,
            dropout_seed=plan.dropout_seed,
            revision=revision,
            **checkpoint.arguments(),
            trust_remote_code=trust_remote_code,
            device=processes.device,
        )
        check_whole(featurizer.model)
        if number == 0:
            dataset, keep_columns, documents = as_chunks(featurizer, dataset, keep_columns)
            masks = masks if masks is None or documents is None else masks[:, torch.from_numpy(documents)]
        featurizer.check(dataset)
        if number == 0:
            if processes.is_first:
                featurizer.check_first_rows(dataset)
            rows = TrainingRows.of(dataset, featurizer.task, keep_columns)
            if processes.is_first:
                logger.info("Columns read: %s.", describe_columns(featurizer.task, dataset))
            if needs_bank(featurizer.task):
                draw_rows(
                    len(dataset), config.bank_size, config.bank_seed
                )  # a bank that cannot be is refused before a file is written
            config = rows.recorded_in(replace(featurizer.config, task=featurizer.task.name))  # with the columns that were found
            n_members = passes[-1].members[-1] + 1
            if part is not None:
                begin_index(folder, config, n_members, overwrite=False, shared=True)
                record_jobs(folder, part, n_members)
            elif processes.is_first:
                begin_index(folder, config, n_members, overwrite=overwrite)
            processes.wait()
        build = (
            partial(build_pass, processes=processes, overwrite=overwrite)
            if part is None
            else partial(build_shards_of_pass, part=part)
        )
        mask = None if masks is None else masks[checkpoint.model]
        description = f"Featurizing {number + 1}/{len(passes)}"
        build(folder, plan, featurizer, rows, mask=mask, description=description, **options)
    if part is None and processes.is_first:
        if overwrite:
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
