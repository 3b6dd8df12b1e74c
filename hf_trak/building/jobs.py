"""An index made by an array of jobs that know nothing of each other: parts of its shards, and putting them together.

While it is unfinished, `.parts.json` in the index's folder says how many members there will be, and how to start a job again.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hf_trak.config import TrakConfig
from hf_trak.distributed import share
from hf_trak.storage.files import field_of, read_json, remove_leftovers, write_json_once
from hf_trak.storage.format import MEMBER_NAME, PARTS_NAME, is_index_name, member_folders
from hf_trak.storage.passes import gram_of
from hf_trak.storage.writer import MemberWriter, forget_progress

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One job's part of the shards of an index.

    Args:
        index (`int`): Which, from 0.
        count (`int`): Of how many. It may change from job to job: each makes what is missing of its part.
        command (`Sequence[str]`, *optional*): What starts such a job, but for its part; told to whoever looks for missing shards.

    Raises:
        ValueError: If there is no such part.
    """

    index: int
    count: int
    command: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`num_shards` must be at least 1, but is {self.count}.")
        if not 0 <= self.index < self.count:
            raise ValueError(f"`shard_index` must be 0 to {self.count - 1} (`num_shards` - 1), but is {self.index}.")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this part of some work: a stretch of neighbours, empty where there are fewer items than parts."""
        return share(items, self.index, self.count)


def record_jobs(folder: Path, part: Job, n_members: int) -> None:
    """Leave word in an index's folder of what jobs are making, unless another job has."""
    if any(not (folder / f"member_{number}" / MEMBER_NAME).exists() for number in range(n_members)):
        command = None if part.command is None else list(part.command)
        write_json_once(folder / PARTS_NAME, {"n_members": n_members, "num_shards": part.count, "command": command})


def remove_job_records(folder: Path) -> None:
    """Remove the word that [`record_jobs`] left: the index is finished."""
    if (folder / PARTS_NAME).exists():
        (folder / PARTS_NAME).unlink(missing_ok=True)


def is_in_parts(folder: Path) -> bool:
    """Return whether jobs are making the index, or have made it and it is not put together yet."""
    return (folder / PARTS_NAME).exists()


def merge_members(folder: Path) -> None:
    """Finish the members of an index whose shards jobs have made: check each shard against its hash, and sum the Gram matrices.

    Raises:
        FileNotFoundError: If no job has begun an index here.
        ValueError: If shards are missing (the message has the commands that make them), or one is not what was written.
    """
    proj_dim = TrakConfig.from_pretrained(folder).proj_dim
    if not is_in_parts(folder):
        raise FileNotFoundError(f"{folder} is not made of parts: no job with --shard-index and --num-shards has begun there.")
    remove_leftovers(folder, is_index_name, shared=False)
    record = read_json(folder / PARTS_NAME)
    members = [folder / f"member_{number}" for number in range(field_of(folder / PARTS_NAME, record, "n_members", int))]
    begun = {
        member: MemberWriter.begun(member)
        for member in member_folders(folder)
        if member in members and not (member / MEMBER_NAME).exists()
    }
    for member in members:
        if (member / MEMBER_NAME).exists():
            forget_progress(member)  # a merge was killed just after it wrote `member.json`
    missing = {member: writer.missing() for member, writer in begun.items()}
    absent = [member for member in members if not member.exists()]
    if absent or any(missing.values()):
        raise ValueError(_what_is_missing(folder, record, begun, missing, absent))
    for writer in begun.values():
        for shard in range(writer.n_shards):
            writer.verify(shard)
    for writer in begun.values():
        writer.finish(gram_of(writer, proj_dim=proj_dim), writer.described(), writer.mask())


def _what_is_missing(
    folder: Path,
    record: dict[str, Any],
    begun: dict[Path, MemberWriter],
    missing: dict[Path, list[int]],
    absent: Sequence[Path],
) -> str:
    lines = [f"{folder} is not complete:"]
    lines += [
        f"  {member.name} lacks {len(shards)} of {begun[member].n_shards} shards: {_stretches(shards)}"
        for member, shards in missing.items()
        if shards
    ]
    lines += [f"  {member.name} has not been begun" for member in absent]
    count = record["num_shards"]
    if absent or not begun:
        jobs = list(range(count))
    else:
        n_shards = next(iter(begun.values())).n_shards
        lacking = {shard for shards in missing.values() for shard in shards}
        jobs = [index for index in range(count) if lacking.intersection(share(range(n_shards), index, count))]
    command = record["command"] and shlex.join(record["command"])
    lines.append("Unless their jobs are still running, start these again, and then merge:")
    lines += [
        f"  {command} --shard-index {index} --num-shards {count}" if command else f"  shard_index={index}, num_shards={count}"
        for index in jobs
    ]
    return "\n".join(lines)


def _stretches(shards: Sequence[int]) -> str:
    """Return numbers as "0, 3 to 5"."""
    found: list[list[int]] = []
    for shard in shards:
        if found and found[-1][1] == shard - 1:
            found[-1][1] = shard
        else:
            found.append([shard, shard])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in found)
