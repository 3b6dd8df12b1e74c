"""Replacing an index: which files in a folder belong to the index, and how a new index takes their place.

A new index is written completely in `.replacement`, a folder inside that of the old index. Its `replaces.json`, written last, lists the
old files to remove. Until then the old index does not change. After that, the exchange can be interrupted at any time, and the next process
that opens the folder completes it. Files that hf_trak did not write are neither moved nor removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_trak.config import CARD_NAME, CONFIG_NAME
from hf_trak.storage.files import file_sizes, name_of_temporary, read_json, refuse_url, remove_file, write_folder, write_json
from hf_trak.storage.format import (
    IDENTITY_NAME,
    MEMBER_NAME,
    PROGRESS,
    is_index_name,
    is_member_name,
    is_shard_name,
    member_number,
    read_origin,
)
from hf_trak.storage.object_store import ObjectPath, local_copy

STAGING = ".replacement"
_PLAN = "replaces.json"


def staging_folder(folder: Path) -> Path:
    """Return the folder in which a new index is written until it is complete."""
    return folder / STAGING


def holds_index(folder: Path) -> bool:
    """Return whether a folder contains the configuration of an index of any format version."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        values = read_json(path)
    except ValueError:
        return False
    return {"proj_dim", "format_version"} <= values.keys()


def foreign_names(folder: Path) -> list[str]:
    """Return the names in a folder, without temporary files of an index and leftovers of a replacement."""
    return sorted(name for name in file_sizes(folder) if name != STAGING and not is_index_name(name_of_temporary(name) or ""))


# Files that an index wrote


def written_files(folder: Path, members: Callable[[int], bool] = lambda number: True) -> list[str]:
    """Return the names of the files of the index in `folder`, without its card, because its owner can edit it.

    Args:
        members (`Callable`): Given a member's number, return whether to include its files; by default, all are included.
    """
    there = file_sizes(folder)
    names = [name for name in there if is_index_name(name) or is_index_name(name_of_temporary(name) or "")]
    for name in there:
        number = member_number(folder / name)
        if number is not None and members(number) and (folder / name).is_dir():
            names += [f"{name}/{inside}" for inside in _member_files(folder / name)]
    return sorted(names)


def _member_files(folder: Path) -> list[str]:
    """Return the names of a member's files: those it lists, or for an unfinished member, those with names that it would list."""
    there = set(file_sizes(folder))
    unfinished = {name for name in file_sizes(folder / PROGRESS) if is_member_file(f"{PROGRESS}/{name}")}
    listed = _listed(folder) if MEMBER_NAME in there else set()
    found = {name for name in there & listed if is_member_name(name)}
    if listed:
        found.add(MEMBER_NAME)
    if MEMBER_NAME in there or IDENTITY_NAME in unfinished:
        found |= {name for name in there if name_of_temporary(name) is not None and is_member_file(name)}
        found |= {name for name in there - found if is_shard_name(name) and _is_our_shard(folder / name)}
    if not listed and (MEMBER_NAME in there or IDENTITY_NAME in unfinished):
        found |= {name for name in there if is_member_name(name) and not is_shard_name(name)}
    return sorted(found) + [f"{PROGRESS}/{name}" for name in sorted(unfinished)]


def is_member_file(name: str) -> bool:
    """Return whether a member's folder may contain a file of this name, complete or temporary. Files in `.progress` are `.progress/NAME`."""
    folder, separator, inside = name.rpartition("/")
    return is_member_name(f"{folder}{separator}{name_of_temporary(inside) or inside}")


def refuse_target(path: Path, read: Mapping[str, str | Sequence[str] | None] | None = None) -> None:
    """Refuse a result file that is a URL, a file of an index, or one of the inputs.

    Args:
        read (`Mapping`, *optional*): The inputs (files, folders and repositories) by the names to use in messages.

    Raises:
        ValueError: Saying what the file is.
    """
    refuse_url(path)
    target = path.resolve()
    for folder, name in ((target.parent, target.name), (target.parent.parent, f"{target.parent.name}/{target.name}")):
        if is_index_name(name) and (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{path} is a file of the index in {folder}, which results may not replace. Choose another name.")
    for name, places in (read or {}).items():
        for place in [places] if isinstance(places, str) else places or ():
            source = Path(place).resolve()
            is_inside = source.is_dir() and not (source / CONFIG_NAME).is_file() and target.is_relative_to(source)
            if target.exists() and (target == source or is_inside):
                raise ValueError(f"{path} is {name} or a file in it, which the results would replace. Choose another name.")


def _listed(folder: Path) -> set[str]:
    """Return the files that a finished member lists; an empty set if its list is damaged."""
    try:
        values: Any = read_json(folder / MEMBER_NAME)
        return {str(entry["file"]) for entry in values["files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _is_our_shard(path: Path) -> bool:
    """Return whether the metadata of a Parquet file is that of a shard."""
    try:
        with local_copy(path) as file:
            return read_origin(pq.read_schema(file).metadata) is not None
    except (pa.ArrowException, OSError):
        return False


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an index, given relative to `folder`, and then empty folders below it.

    Raises:
        OSError: With advice, if a file cannot be removed.
    """
    folders = set()
    for name in names:
        remove_file(folder / name)
        folders |= {name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)}
    if not isinstance(folder, ObjectPath):
        for name in sorted(folders, key=lambda one: -one.count("/")):
            with suppress(OSError):  # it holds something else, or is a link
                (folder / name).rmdir()


# Replacing an old index by a new one


def begin_replacement(folder: Path, config: dict[str, Any]) -> Path:
    """Return the folder for a new index with the configuration `config`. An unfinished one is continued."""
    refuse_linked_folders(folder, [])
    staging = staging_folder(folder)
    path = staging / CONFIG_NAME
    if not (path.is_file() and holds_index(staging) and read_json(path) == config):
        drop_replacement(folder)
        write_folder(staging)
        write_json(path, config)
    return staging


def drop_replacement(folder: Path) -> None:
    """Remove a new index that was never completed."""
    staging = staging_folder(folder)
    if not isinstance(staging, ObjectPath) and (not staging.is_dir() or staging.is_symlink()):
        return
    remove_files(staging, _staged_files(staging))
    if not isinstance(staging, ObjectPath):
        members = [staging / name for name in file_sizes(staging) if member_number(staging / name) is not None]
        for empty in (*(member / PROGRESS for member in members), *members, staging):
            with suppress(OSError):  # it is not there, or holds something else
                empty.rmdir()


def _staged_files(staging: Path) -> list[str]:
    """Return the names of the files of an index in `.replacement`, complete or not."""
    there = file_sizes(staging)
    names = [name for name in there if _is_staged(name) or _is_staged(name_of_temporary(name) or "")]
    for name in there:
        if member_number(staging / name) is not None:
            inside = [one for one in file_sizes(staging / name) if one != PROGRESS]
            inside += [f"{PROGRESS}/{one}" for one in file_sizes(staging / name / PROGRESS)]
            names += [f"{name}/{one}" for one in inside if is_member_file(one)]
    return sorted(names)


def _is_staged(name: str) -> bool:
    return is_index_name(name) or name in (CARD_NAME, _PLAN)


def commit_replacement(folder: Path, old: Sequence[str]) -> None:
    """Replace an old index, whose files are `old`, by the complete one in `.replacement`.

    Raises:
        ValueError: If a file that hf_trak did not write has the name of a new file. Nothing changes then.
        OSError: With advice, if a file cannot be moved. The next process that opens the folder continues.
    """
    staging = staging_folder(folder)
    new = [name for name in _staged_files(staging) if name_of_temporary(name.rsplit("/", 1)[-1]) is None]
    refuse_foreign(folder, new, old)
    write_json(staging / _PLAN, {"removes": sorted(set(old) - set(new))})
    finish_replacement(folder)


def refuse_foreign(folder: Path, new: Sequence[str], old: Sequence[str]) -> None:
    """Refuse to replace files that hf_trak did not write, and files in folders that are links.

    Raises:
        ValueError: Naming them.
    """
    refuse_linked_folders(folder, [*old, *new])
    known = {*old, CARD_NAME}
    taken = [name for name in new if name not in known and ((folder / name).exists() or _is_link(folder / name))]
    taken += [CARD_NAME] if _is_link(folder / CARD_NAME) else []
    if taken:
        raise ValueError(
            f"{folder / taken[0]} was not written by an index, and would be replaced. Move it to another folder, or choose another folder "
            "for the index. Nothing was changed."
        )


def refuse_linked_folders(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace files in a folder that is a symbolic link, because they may belong to another index.

    Args:
        names (`Iterable[str]`): Files relative to `folder`.

    Raises:
        ValueError: Naming the link.
    """
    below = {name.rsplit("/", depth)[0] for name in names for depth in range(1, name.count("/") + 1)}
    for link in sorted(one for one in {*below, STAGING} if _is_link(folder / one)):
        raise ValueError(
            f"{folder / link} is a symbolic link to {os.readlink(folder / link)}, whose files may be another index's; they are not replaced. "
            "Remove the link, or choose another folder. Nothing was changed."
        )


def _is_link(path: Path) -> bool:
    return not isinstance(path, ObjectPath) and path.is_symlink()


def finish_replacement(folder: Path) -> None:
    """Complete an exchange that was interrupted after the new index was complete, if there is one.

    Raises:
        OSError: With advice, if a file cannot be moved or removed.
        ValueError: If the list of files to remove is damaged. Nothing is removed then.
    """
    staging = staging_folder(folder)
    if not (staging / _PLAN).is_file() or _is_link(staging):
        return
    removes = read_json(staging / _PLAN).get("removes")
    if not isinstance(removes, list) or not all(isinstance(name, str) and _may_go(name) for name in removes):
        raise ValueError(f"{staging / _PLAN} lists files that no index writes, and none was removed. Delete {staging}.")
    remove_files(folder, removes)
    for name in _staged_files(staging):
        if name != _PLAN:
            _move(staging / name, folder / name)
    remove_files(staging, [*_staged_files(staging), _PLAN])
    drop_replacement(folder)


def _may_go(name: str) -> bool:
    """Return whether a file of this name may be removed: a file of an index, or a temporary file of one."""
    folder, separator, inside = name.rpartition("/")
    return is_index_name(name) or is_index_name(f"{folder}{separator}{name_of_temporary(inside) or ''}")


def _move(source: Path, target: Path) -> None:
    if isinstance(source, ObjectPath):
        source.move_to(target)
        return
    write_folder(target.parent)
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not target.is_file():  # unless another process completes the same exchange
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{target} may not be written: {os.strerror(error.errno or 0)}. The new index is whole, but only partly in its place: make "
            f"{target.parent} writable, and open it again.",
        ) from error


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a target that is the source, is inside it, or contains it.

    Raises:
        ValueError: Naming both.
    """
    if isinstance(source, ObjectPath) != isinstance(target, ObjectPath):
        return
    here, there = _parts(source), _parts(target)
    shared = min(len(here), len(there))
    if here[:shared] != there[:shared] and not _is_same_on_disk(source, target):
        return
    relation = "is the index itself" if here == there else "lies in the index" if len(there) > len(here) else "holds the index"
    raise ValueError(
        f"{target} {relation} that is to be copied, {source}. Choose a folder that neither contains the index nor is inside it; nothing was "
        "changed."
    )


def _parts(path: Path) -> list[str]:
    if not isinstance(path, ObjectPath):
        return list(path.resolve().parts)
    protocol, _, rest = path.url.partition("://")
    same = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
    # Bucket names ignore case, and some stores do not distinguish keys that differ only in case.
    parts = [part for part in rest.casefold().split("/") if part not in ("", ".")]
    return [same.get(protocol.casefold(), protocol.casefold()), *parts]


def _is_same_on_disk(source: Path, target: Path) -> bool:
    """Return whether one of two local folders is or contains the other under another name (a mount, or a case-insensitive disk)."""
    if isinstance(source, ObjectPath) or isinstance(target, ObjectPath):
        return False
    here, there = _inodes(source), _inodes(target)
    return bool(here and there) and (here[0] in there or (target.exists() and there[0] in here))


def _inodes(path: Path) -> list[tuple[int, int]]:
    """Return the device and inode of a folder and its parents, as far as they exist, the deepest first."""
    whole = path.resolve()
    return [(one.stat().st_dev, one.stat().st_ino) for one in (whole, *whole.parents) if one.exists()]
