"""One pass of gradients over a training set: the members of one checkpoint, by one process, by several, or by one job of an array."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.checks import TrainingRows
from hf_trak.building.jobs import Job
from hf_trak.distributed import Processes
from hf_trak.featurizing.engine_choice import EngineChoice
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.identity import describe_featurizer, describe_member, identity_of, library_minors, warn_of_libraries
from hf_trak.featurizing.loop import featurize
from hf_trak.members import Pass
from hf_trak.storage.files import read_json
from hf_trak.storage.format import BANK_NAME, MEMBER_NAME, STATISTICS_NAME
from hf_trak.storage.passes import PassWriter, gram_of, keep_stretch, stretches
from hf_trak.storage.writer import MemberWriter
from hf_trak.tasks import Bank

if TYPE_CHECKING:
    from datasets import Dataset

DEFAULT_SHARD_ROWS = 1024


@dataclass(frozen=True)
class Writing:
    """How features are computed and written, whatever they are; see [`AttributionIndex.build`]."""

    batch_size: int | str = "auto"
    shard_rows: int = DEFAULT_SHARD_ROWS
    overwrite: bool = False
    progress: bool = True


def build_pass(
    folder: Path,
    plan: Pass,
    featurizer: Featurizer,
    rows: TrainingRows,
    writing: Writing,
    *,
    by: Processes | Job,
    mask: Bool[Tensor, " rows"] | None = None,
    description: str,
) -> None:
    """Featurize a dataset once for all members of a pass, going on where an earlier call stopped.

    Of several processes every one takes a stretch of the missing shards; the first opens the folder before the others do, and finishes
    the members when all are done. A job makes its stretch in a folder that other jobs write to at any time, and leaves the members
    unfinished, with what only it knows and [`merge_members`] will need.

    Args:
        folder (`Path`): The index.
        by ([`Processes`] or [`Job`]): Who makes the shards.
        mask (`torch.Tensor`, *optional*): Which rows the checkpoint was trained on, to be recorded.
    """
    proj_dim = featurizer.config.proj_dim
    job, processes = (by, Processes()) if isinstance(by, Job) else (None, by)
    if processes.is_first:
        writers = _open(folder, plan, featurizer, rows, writing, shared=job is not None)
    processes.wait()
    if not processes.is_first:
        writers = _open(folder, plan, featurizer, rows, writing, shared=True)
    whole = PassWriter(writers, plan.seeds)
    # The first process's view: a network file system may show the others an older one.
    open_members, missing = processes.tell([_unfinished(writers), whole.missing()] if processes.is_first else None)
    if not open_members:
        return
    unfinished = [writers[number] for number in open_members]
    info = partial(describe_member, folder, plan, featurizer, rows.dataset)
    if job is not None:
        description, shards = f"{description}, part {job.index} of {job.count}", job.share(range(whole.n_shards))
        for writer in unfinished:
            writer.describe(info(), mask)
    else:
        shards = processes.share(missing)
        description += f", 1 of {processes.count} processes" if processes.count > 1 else ""
    featurize(
        featurizer,
        rows.dataset,
        whole,
        shards=shards,
        batch_size=writing.batch_size,
        progress=writing.progress and processes.is_first,
        description=description,
        speak=processes.is_first,
        check=processes.check,
    )
    processes.wait()
    if processes.count > 1:
        _see_shards(whole)
    if processes.count > 1 or job is not None:
        _keep_stretches(unfinished, processes, proj_dim=proj_dim)
    if job is None and processes.is_first:
        for writer in unfinished:
            writer.finish(gram_of(writer, proj_dim=proj_dim), info(), mask)
    processes.wait()


def _keep_stretches(writers: Sequence[MemberWriter], processes: Processes, *, proj_dim: int) -> None:
    """Sum the Gram matrices of stretches whose shards are all there, shared among the processes."""
    missing = [set(writer.missing()) for writer in writers]
    found = [
        (writer, stretch)
        for writer, lacking in zip(writers, missing, strict=True)
        for stretch in stretches(writer.n_shards)
        if not lacking.intersection(stretch)
    ]
    for writer, stretch in processes.share(found):
        keep_stretch(writer, stretch, proj_dim=proj_dim)
        processes.check()
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


def _open(
    folder: Path, plan: Pass, featurizer: Featurizer, rows: TrainingRows, writing: Writing, *, shared: bool
) -> list[MemberWriter]:
    """Return the writers of the members of a pass, which share their statistics, bank and engine.

    Args:
        shared (`bool`): Other processes may be writing the members at this moment. Nothing is ever replaced then.
    """
    found = describe_featurizer(featurizer, rows.columns)
    common = {"config": identity_of(featurizer.config), "dataset": rows.identity(), "libraries": library_minors()}
    config = rows.recorded_in(replace(featurizer.config, task=featurizer.task.name))
    writers = []
    for number, seed in zip(plan.members, plan.seeds, strict=True):
        is_first = number == 0
        identity = {**found, "seed": seed, **common, **(rows.kept_identity() if is_first else {})}
        writers.append(
            MemberWriter.of_index(
                folder,
                number,
                config.to_dict(),
                identity=_with_recorded_libraries(folder / f"member_{number}", identity),
                n_rows=len(rows.dataset),
                shard_rows=writing.shard_rows,
                beside=rows.all_columns if is_first else rows.digest_column,
                overwrite=writing.overwrite,
                shared=shared,
            )
        )
    _share(writers, featurizer, rows.dataset)
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
        featurizer.checkpoint.use_statistics(statistics)
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
