"""What an index wrote, and nothing else: which files of a folder are an index's, and how another index takes their place.

A new index is made whole in `.replacement`, in the folder of the one that it replaces. Its `replaces.json`, written last, lists the old
files that go. From then on the exchange may be stopped at any moment: the next process that opens the folder ends it. Until then the
old index is untouched. Files that no index wrote are neither moved nor removed.
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
    """Return where a new index lies until it is whole, of the index in `folder`."""
    return folder / STAGING


def holds_index(folder: Path) -> bool:
    """Return whether a folder holds the configuration of an index, of whatever format version."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        values = read_json(path)
    except ValueError:
        return False
    return {"proj_dim", "format_version"} <= values.keys()


def foreign_names(folder: Path) -> list[str]:
    """Return what lies in a folder but for temporary files of an index and what is left of a replacement."""
    return sorted(name for name in file_sizes(folder) if name != STAGING and not is_index_name(name_of_temporary(name) or ""))


# What an index wrote


def written_files(folder: Path, members: Callable[[int], bool] = lambda number: True) -> list[str]:
    """Return the names of the files that the index in `folder` wrote, but for its card, which its owner writes into.

    Args:
        members (`Callable`): Given a member's number, whether its files are meant; by default, those of all.
    """
    there = file_sizes(folder)
    names = [name for name in there if is_index_name(name) or is_index_name(name_of_temporary(name) or "")]
    for name in there:
        number = member_number(folder / name)
        if number is not None and members(number) and (folder / name).is_dir():
            names += [f"{name}/{inside}" for inside in _member_files(folder / name)]
    return sorted(names)


def _member_files(folder: Path) -> list[str]:
    """Return the names of a member's files: those it lists, and, of an unfinished one, those under the names it would list."""
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
    """Return whether a member's folder may hold a file of this name, whole or temporary; one in `.progress` is `.progress/NAME`."""
    folder, separator, inside = name.rpartition("/")
    return is_member_name(f"{folder}{separator}{name_of_temporary(inside) or inside}")


def refuse_target(path: Path, read: Mapping[str, str | Sequence[str] | None] | None = None) -> None:
    """Refuse a name for a file of results that would replace what is no earlier result: a URL, a file of an index, or what is read.

    Args:
        read (`Mapping`, *optional*): Files, folders and repositories that the results are made from, by what they are called.

    Raises:
        ValueError: Saying what it is.
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
    """Return the files that a finished member lists; none if its list is damaged."""
    try:
        values: Any = read_json(folder / MEMBER_NAME)
        return {str(entry["file"]) for entry in values["files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _is_our_shard(path: Path) -> bool:
    """Return whether a Parquet file says that a member's writer made it."""
    try:
        with local_copy(path) as file:
            return read_origin(pq.read_schema(file).metadata) is not None
    except (pa.ArrowException, OSError):
        return False


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an index, by names as seen from `folder`, and the folders below it that are empty then.

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


# A new index in the place of an old one


def begin_replacement(folder: Path, config: dict[str, Any]) -> Path:
    """Return where a new index of the configuration `config` is made until it is whole; one that was begun is gone on with."""
    refuse_linked_folders(folder, [])
    staging = staging_folder(folder)
    path = staging / CONFIG_NAME
    if not (path.is_file() and holds_index(staging) and read_json(path) == config):
        drop_replacement(folder)
        write_folder(staging)
        write_json(path, config)
    return staging


def drop_replacement(folder: Path) -> None:
    """Remove what is left of a new index that never became whole."""
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
    """Return the names of the files of an index in `.replacement`, whole or not."""
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
    """Put the index that is whole in `.replacement` in the place of an old one, whose files are `old`.

    Raises:
        ValueError: If a file that no index wrote has the name of a new one; nothing is changed then.
        OSError: With advice, if a file cannot be moved. The next process that opens the folder goes on.
    """
    staging = staging_folder(folder)
    new = [name for name in _staged_files(staging) if name_of_temporary(name.rsplit("/", 1)[-1]) is None]
    refuse_foreign(folder, new, old)
    write_json(staging / _PLAN, {"removes": sorted(set(old) - set(new))})
    finish_replacement(folder)


def refuse_foreign(folder: Path, new: Sequence[str], old: Sequence[str]) -> None:
    """Refuse names that files have which no index wrote, and files in folders that are links.

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
    """Refuse to replace files in a folder that is a symbolic link: they may be another index's.

    Args:
        names (`Iterable[str]`): Files as seen from `folder`.

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
    """End an exchange that was stopped after the new index was whole, if there is one.

    Raises:
        OSError: With advice, if a file cannot be moved or removed.
        ValueError: If the list of files that go is damaged; none is removed then.
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
    """Return whether a file of this name may be removed: one of an index, or a temporary one of it."""
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
        if not target.is_file():  # unless another process ends the same exchange
            raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{target} may not be written: {os.strerror(error.errno or 0)}. The new index is whole, but only partly in its place: make "
            f"{target.parent} writable, and open it again.",
        ) from error


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies in it, or holds it.

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
        f"{target} {relation} that is to be copied, {source}. Choose a folder that neither holds the index nor lies in it; nothing was "
        "changed."
    )


def _parts(path: Path) -> list[str]:
    if not isinstance(path, ObjectPath):
        return list(path.resolve().parts)
    protocol, _, rest = path.url.partition("://")
    same = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
    # Buckets have no case; of two keys that differ in case alone, some stores make one.
    parts = [part for part in rest.casefold().split("/") if part not in ("", ".")]
    return [same.get(protocol.casefold(), protocol.casefold()), *parts]


def _is_same_on_disk(source: Path, target: Path) -> bool:
    """Return whether one of two local folders is, or holds, the other under another name: a mount, or a disk that has no case."""
    if isinstance(source, ObjectPath) or isinstance(target, ObjectPath):
        return False
    here, there = _inodes(source), _inodes(target)
    return bool(here and there) and (here[0] in there or (target.exists() and there[0] in here))


def _inodes(path: Path) -> list[tuple[int, int]]:
    """Return what identifies a folder and those above it, as far as they exist, the deepest first."""
    whole = path.resolve()
    return [(one.stat().st_dev, one.stat().st_ino) for one in (whole, *whole.parents) if one.exists()]
