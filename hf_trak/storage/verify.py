"""Verification of an index by the hashes of its files. A file is hashed once, as long as it does not change.

Known hashes are in a cache outside the index, so an index on a read-only disk can be verified too. A file counts as unchanged if its size,
inode, modification time and change time are those at the time of hashing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.hashing import hash_file
from hf_trak.messages import DamagedFile
from hf_trak.storage.columns import check_shard
from hf_trak.storage.files import file_sizes, name_of_temporary, read_sealed
from hf_trak.storage.format import (
    DAMPING_NAME,
    GRAM_NAME,
    MEMBER_NAME,
    PROGRESS,
    Origin,
    differences_from,
    is_index_name,
    is_shard_name,
    member_numbers,
    origin_of,
    read_member_info,
)
from hf_trak.storage.replacing import STAGING, is_member_file

_CACHE = "HF_TRAK_CACHE"
_SETTLED_NS = 2_000_000_000  # a file can change twice within one tick of its file system's clock

_known: dict[Path, dict[str, str]] = {}  # cache file -> name -> state of the file, and its hash


def cache_folder() -> Path:
    """Return the cache folder: `HF_TRAK_CACHE`, or by default `hf_trak` in the folder of the Hub's caches."""
    if _CACHE in os.environ:
        return Path(os.environ[_CACHE])
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_trak"


def is_as_written(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a local file has the size and SHA-256 in `record`. A file that was hashed before and has not changed is not hashed
    again."""
    try:
        state = path.stat()
    except OSError:
        return False
    if state.st_size != record["bytes"]:
        return False
    known, cache = _state_and_hash(state, record), _cache_file(path.parent)
    if _read(cache).get(path.name) == known:
        return True
    if hash_file(path) != record["sha256"]:
        return False
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS:
        _remember(cache, path.name, known)
    return True


def remember_written(path: Path, record: Mapping[str, Any]) -> None:
    """Let this process, which has just written a file, read it without hashing it again. Other processes hash it."""
    _read(_cache_file(path.parent))[path.name] = _state_and_hash(path.stat(), record)


def _state_and_hash(state: os.stat_result, record: Mapping[str, Any]) -> str:
    parts = (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns, record["sha256"])
    return " ".join(str(part) for part in parts)


def _cache_file(folder: Path) -> Path:
    return cache_folder() / "verified" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _read(cache: Path) -> dict[str, str]:
    if cache not in _known:
        lines = []
        with suppress(OSError):  # no cache yet
            lines = cache.read_text(encoding="utf-8", errors="replace").splitlines()
        parts = [line.partition("\t") for line in lines]
        _known[cache] = {name: known for name, separator, known in parts if separator}
    return _known[cache]


def _remember(cache: Path, name: str, known: str) -> None:
    """Append a line in a single write, so that several processes can verify the same index at once."""
    _read(cache)[name] = known
    if "\n" in name or "\t" in name:
        return
    with suppress(OSError):  # without a cache, files are hashed each time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{known}\n")


AGAIN = "Run the command that made the index again: only files that are missing or damaged are made again."
_COPY = "restore it from a copy, or run the command that made the index again."
RESTORE = (
    "Restore it from a copy, or run the command that made the index again: it uses the complete shards. If it refuses, "
    "delete {folder} first: it makes that member again."
)


class Finding(NamedTuple):
    """The result for one file.

    Args:
        file (`str`): Path relative to the index's folder.
        state (`str`): "whole", "missing", "damaged", or "left" for a harmless leftover of a killed process.
        problem (`str`): What is wrong with the file; empty if nothing is.
        mend (`str`): What to do about it.
        bytes (`int`): Size of the file.
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
    """Yield a finding for each file of the index in `folder`. Every file is hashed; the cache of hashes is not used.

    Args:
        fetch (`Callable`, *optional*): Downloads a file, given its path relative to the index, to `folder`, which is a cache.
        mend (`str`): What to do about damaged shards.

    Raises:
        FileNotFoundError: If there is no index.
    """
    if not (folder / CONFIG_NAME).exists():
        members = fetch is None and member_numbers(folder)
        way_out = f", but members of one. {AGAIN}" if members else ", so it is not an attribution index."
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}{way_out}")
    numbers = member_numbers(folder)
    config, finding = _read_config(folder)
    if config is not None and (differing := _told_by_all_members(folder, numbers, config)):
        said = f"every member was made with other values: {'; '.join(differing)}"
        config, finding = None, Finding(CONFIG_NAME, "damaged", said, f"Set these back to what the members have, or {_COPY}")
    yield finding
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
        return None, Finding(CONFIG_NAME, "damaged", _reason(error), _COPY.capitalize())
    return config, Finding(CONFIG_NAME, "whole", bytes=(folder / CONFIG_NAME).stat().st_size)


def _told_by_all_members(folder: Path, numbers: Sequence[int], config: TrakConfig) -> list[str]:
    """Return the differences of the configuration from the members, if all members have the same; the configuration is then wrong."""
    differing = []
    for number in numbers:
        with suppress(ValueError, FileNotFoundError):  # reported for that member
            differing.append(differences_from(read_member_info(folder / f"member_{number}")["identity"], config))
    return differing[0] if differing and all(lines == differing[0] for lines in differing) else []


def _verify_sealed(folder: Path, name: str, mend: str) -> Finding:
    try:
        read_sealed(folder / name)
    except ValueError as error:
        return Finding(name, "damaged", _reason(error), mend)
    return Finding(name, "whole", bytes=(folder / name).stat().st_size)


def _reason(error: Exception) -> str:
    """Return the problem from an error message, without the file's name and the advice if the error stores them separately."""
    return error.reason if isinstance(error, DamagedFile) else str(error)


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
        yield Finding(name, "damaged", _reason(error), restore)
        return
    lines = [] if config is None else differences_from(info["identity"], config)
    if lines:
        yield Finding(name, "damaged", f"it belongs to another index than {CONFIG_NAME}: {'; '.join(lines)}", restore)
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
    """Return the problem with the content of a file; empty if there is none."""
    try:
        if origin is not None:
            check_shard(path, origin, n_rows=entry["rows"])
        elif path.name == GRAM_NAME:
            gram = load_file(path)["gram"]
            if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not torch.isfinite(gram).all():
                return f"it is not a square matrix of finite numbers; its shape is {tuple(gram.shape)}"
    except (ValueError, KeyError, OSError, pa.ArrowException, SafetensorError) as error:
        return _reason(error)
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
        yield Finding(name, "left", "not part of the index; a killed process left it", "It does no harm.")
