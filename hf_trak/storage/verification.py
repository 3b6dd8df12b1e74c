"""Every file of an index, held against what was recorded when it was written: what is damaged, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.hashing import hash_file
from hf_trak.storage.columns import check_shard
from hf_trak.storage.differences import list_differences
from hf_trak.storage.files import file_sizes, name_of_temporary, read_sealed
from hf_trak.storage.layout import (
    DAMPING_NAME,
    KERNEL_NAME,
    MEMBER_NAME,
    PROGRESS,
    is_index_name,
    is_shard_name,
    member_numbers,
)
from hf_trak.storage.member_info import read_member_info
from hf_trak.storage.origins import Origin, origin_of
from hf_trak.storage.replacing import STAGING, is_member_file

AGAIN = "Run the command that made the index again: only files that are missing or damaged are made again."
RESTORE = (
    "Restore it from a copy, or run the command that made the index again: it goes by the files of rows that are whole. If it refuses, "
    "delete {folder} first: it makes that member again."
)


class Finding(NamedTuple):
    """What was found of one file.

    Args:
        file (`str`): As seen from the index's folder.
        state (`str`): "whole", "missing", "damaged", or "left" of what a killed process left, which does no harm.
        problem (`str`): What is wrong with it; empty if nothing is.
        mend (`str`): What to do about it.
        bytes (`int`): Its length.
    """

    file: str
    state: str
    problem: str = ""
    mend: str = ""
    bytes: int = 0

    @property
    def is_damage(self) -> bool:
        return self.state in ("missing", "damaged")


def verify_index(folder: Path, fetch: Callable[[str], Any] | None = None, mend: str = AGAIN) -> Iterator[Finding]:
    """Yield what is found of each file of the index in `folder`; every file is hashed, whatever is remembered of it.

    Args:
        fetch (`Callable`, *optional*): Brings a file, by its name as seen from the index, to `folder`, which is a cache.
        mend (`str`): What to do about files of rows.

    Raises:
        FileNotFoundError: If there is no index.
    """
    if not (folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}, so it is not an attribution index.")
    config, finding = _read_config(folder)
    yield finding
    numbers = member_numbers(folder)
    for number in range(max(numbers, default=0) + 1):
        yield from _verify_member(folder, number, config, fetch, mend)
    if (folder / DAMPING_NAME).exists():
        yield _verify_sealed(folder, DAMPING_NAME, "Delete it: it is computed again.")
    if fetch is None:
        yield from _leftovers(folder, numbers)


def _read_config(folder: Path) -> tuple[TrakConfig | None, Finding]:
    try:
        config = TrakConfig.from_pretrained(folder)
    except ValueError as error:
        return None, Finding(
            CONFIG_NAME, "damaged", str(error), "Restore it from a copy, or run the command that made the index again."
        )
    return config, Finding(CONFIG_NAME, "whole", bytes=(folder / CONFIG_NAME).stat().st_size)


def _verify_sealed(folder: Path, name: str, mend: str) -> Finding:
    try:
        read_sealed(folder / name)
    except ValueError as error:
        return Finding(name, "damaged", str(error), mend)
    return Finding(name, "whole", bytes=(folder / name).stat().st_size)


def _verify_member(
    folder: Path, number: int, config: TrakConfig | None, fetch: Callable[[str], Any] | None, mend: str
) -> Iterator[Finding]:
    member = folder / f"member_{number}"
    name = f"{member.name}/{MEMBER_NAME}"
    restore = mend if fetch is not None else RESTORE.format(folder=member)
    if not (member / MEMBER_NAME).exists():
        problem = "the member is unfinished" if (member / PROGRESS).exists() else "it is not there"
        yield Finding(name, "missing", problem, mend)
        return
    try:
        info = read_member_info(member)
    except ValueError as error:
        yield Finding(name, "damaged", str(error), restore)
        return
    found = info["identity"].get("config")
    lines = [] if config is None else list_differences(found, config.identity())
    if lines:
        yield Finding(name, "damaged", f"it is of another index than {CONFIG_NAME}: {'; '.join(lines)}", restore)
    else:
        yield Finding(name, "whole", bytes=(member / MEMBER_NAME).stat().st_size)
    shards = [entry["file"] for entry in info["files"] if "rows" in entry]
    for entry in info["files"]:
        is_shard = "rows" in entry
        origin = None
        if is_shard:
            origin = origin_of(member, info["identity"], shards.index(entry["file"]), n_shards=len(shards))
        yield _verify_file(member, entry, origin, fetch, mend)


def _verify_file(
    member: Path, entry: dict[str, Any], origin: Origin | None, fetch: Callable[[str], Any] | None, mend: str
) -> Finding:
    path, name = member / entry["file"], f"{member.name}/{entry['file']}"
    if fetch is not None:
        try:
            fetch(name)
        except ValueError as error:
            return Finding(name, "damaged", str(error), mend)
    if not path.exists():
        return Finding(name, "missing", "it is not there", mend)
    size = path.stat().st_size
    problem = ""
    if size != entry["bytes"]:
        problem = f"it has {size:,} bytes, where {entry['bytes']:,} were written"
    elif hash_file(path) != entry["sha256"]:
        problem = f"its SHA-256 differs from the one in {MEMBER_NAME}"
    inside = _problem_inside(path, entry, origin)
    if problem or inside:
        return Finding(name, "damaged", inside or problem, mend, size)
    return Finding(name, "whole", bytes=size)


def _problem_inside(path: Path, entry: dict[str, Any], origin: Origin | None) -> str:
    """Return what is wrong with the content of a file."""
    try:
        if origin is not None:
            check_shard(path, origin, n_rows=entry["rows"])
        elif path.name == KERNEL_NAME:
            kernel = load_file(path)["kernel"]
            if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or not torch.isfinite(kernel).all():
                return f"it is no square matrix of finite numbers, but of shape {tuple(kernel.shape)}"
    except (ValueError, KeyError, OSError, pa.ArrowException, SafetensorError) as error:
        return str(error)
    return ""


def _leftovers(folder: Path, numbers: list[int]) -> Iterator[Finding]:
    names = [name for name in file_sizes(folder) if is_index_name(name_of_temporary(name) or "")]
    for number in numbers:
        member = folder / f"member_{number}"
        listed = set()
        if (member / MEMBER_NAME).exists():
            try:
                listed = {entry["file"] for entry in read_member_info(member)["files"]}
            except ValueError:
                continue
        for name in file_sizes(member):
            is_temporary = name_of_temporary(name) is not None and is_member_file(name)
            if is_temporary or (listed and is_shard_name(name) and name not in listed):
                names.append(f"{member.name}/{name}")
    if (folder / STAGING).is_dir():
        names.append(STAGING)
    for name in names:
        yield Finding(name, "left", "no part of the index: a process that was killed left it", "It does no harm.")
