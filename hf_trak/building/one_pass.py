"""One pass of gradients over a dataset, which makes one member of an index or several: who does which of its shards, and who ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.parts import Part
from hf_trak.building.training_rows import TrainingRows
from hf_trak.featurizing.descriptions import (
    describe_featurizer,
    describe_member,
    identity_of,
    library_minors,
    warn_of_libraries,
)
from hf_trak.featurizing.engines import EngineChoice
from hf_trak.featurizing.featurize import featurize
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.members import Pass
from hf_trak.processes.group import Processes
from hf_trak.storage.files import read_json
from hf_trak.storage.kernel_sums import keep_stretch, kernel_of, stretches
from hf_trak.storage.layout import MEMBER_NAME
from hf_trak.storage.member_writer import MemberWriter
from hf_trak.storage.passes import PassWriter
from hf_trak.tasks import Bank

if TYPE_CHECKING:
    from datasets import Dataset


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
        _share_bank(writers, featurizer, rows.dataset)
        _share_engine(writers, featurizer, rows.dataset)
    processes.wait()
    if not processes.is_first:
        writers = _open(folder, plan, featurizer, rows, shard_rows, overwrite=overwrite, shared=True)
        _share_bank(writers, featurizer, rows.dataset)
        _share_engine(writers, featurizer, rows.dataset)
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
            writer.finish(kernel_of(writer, proj_dim=proj_dim), describe_member(folder, plan, featurizer, rows.dataset), mask)
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


def build_part_of_pass(
    folder: Path,
    plan: Pass,
    featurizer: Featurizer,
    rows: TrainingRows,
    *,
    part: Part,
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
    _share_bank(writers, featurizer, rows.dataset)
    _share_engine(writers, featurizer, rows.dataset)
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


def _share_bank(writers: Sequence[MemberWriter], featurizer: Featurizer, dataset: Dataset) -> None:
    """Give every member of a pass the same bank: the one an earlier call or another process wrote, so that going on gives the same
    bytes, or a new one."""
    if all(writer.is_finished for writer in writers):
        return
    found = next((tensors for writer in writers if (tensors := writer.bank()) is not None), None)
    if found is None:
        bank = featurizer.make_bank(dataset)
        if bank is None:
            return
        writers[0].write_bank(bank.tensors())
        found = writers[0].bank()  # another process may have been first
    assert found is not None
    featurizer.use_bank(Bank.from_tensors(found))
    for writer in writers:
        if writer.bank() is None:
            writer.write_bank(found)


def _share_engine(writers: Sequence[MemberWriter], featurizer: Featurizer, dataset: Dataset) -> None:
    """Give a pass one engine: the one an earlier call or another process decided on, or the one that the data set's rows decide now.

    Every process checks the same rows of the data set, whichever shards it makes, and goes by what was written first.
    """
    unfinished = [writer for writer in writers if not writer.is_finished]
    if not unfinished:
        return
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
