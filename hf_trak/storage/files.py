"""Files that are written whole or not at all, at once on disk, with advice where a disk refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_trak.storage.layout import IDENTITY_NAME, MEMBER_NAME, PROGRESS
from hf_trak.storage.object_store import ObjectPath

TEMPORARY = ".tmp"  # ends the names of files that are not whole


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: If it is damaged.
    """
    return _parse_json(path, path.read_text())


def _parse_json(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it, or restore it from a copy.") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_json_once(path: Path, value: dict[str, Any]) -> bool:
    """Write a JSON file as [`write_once`] does, and return whether it was written here."""
    return write_once(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_jsons(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the JSON files in a folder that are there, of these names.

    Raises:
        ValueError: If one is damaged.
    """
    if not isinstance(folder, ObjectPath):
        return {name: read_json(folder / name) for name in names if (folder / name).exists()}
    found = folder.read_all(names)
    return {name: _parse_json(folder / name, found[name]) for name in names if name in found}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder; of none if it is not there."""
    if isinstance(folder, ObjectPath):
        return folder.sizes()
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}
    return {}


def file_size(path: Path) -> int | None:
    """Return the bytes of a file; None if there is none."""
    if isinstance(path, ObjectPath):
        return path.size()
    return path.stat().st_size if path.exists() else None


def write_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there; an object store has none.

    Raises:
        OSError: With advice, as [`write_atomically`] has it.
    """
    if isinstance(path, ObjectPath):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = _advice(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to disk, and give it its name; or put it there in one go.

    Raises:
        OSError: With advice, if the disk is full, the folder read-only or gone; the temporary file is removed and nothing else is
            touched.
    """
    if isinstance(path, ObjectPath):
        path.put(write)
    else:
        _write(path, write, os.replace)


def write_once(path: Path, write: Callable[[Path], Any]) -> bool:
    """Write a file as [`write_atomically`] does, unless there is one; of several processes at once, one succeeds.

    Returns:
        `bool`: Whether it was written here.
    """
    if isinstance(path, ObjectPath):
        return path.put_once(write)
    try:
        _write(path, write, _link)
    except FileExistsError:
        return False
    return True


def _write(path: Path, write: Callable[[Path], Any], name: Callable[[Path, Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}{TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        name(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError:
        raise
    except OSError as error:
        advice = _advice(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error
    finally:
        with suppress(OSError):  # what is wrong has been said above
            temporary.unlink(missing_ok=True)


def _host() -> str:
    """Return this machine's name, part of those of temporary files: processes of several machines may share a folder."""
    return socket.gethostname().replace(".", "-")


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            raise
        # A file system without hard links: between these two lines another process may write the same.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


_ADVICE = {
    (
        errno.ENOSPC,
        errno.EDQUOT,
    ): "The disk is full: {path} was not written. What was finished is kept; free some space and run again.",
    (
        errno.EFBIG,
    ): "{path} is larger than this system lets a file be (`ulimit -f`), and was not written. What was finished is kept; "
    "raise the limit, or take a smaller shard_rows.",
    (errno.EROFS, errno.EACCES, errno.EPERM): "{path} may not be written: {reason}. What was finished is kept; make {folder} "
    "writable, or copy it to where you may write, and run again.",
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ENODEV,
        errno.EIO,
    ): "{path} was not written: {folder} is gone or out "
    "of reach ({reason}). Was it deleted, or has its mount vanished? What was finished is kept there; bring it back and run again.",
}


def _advice(error: OSError, path: Path) -> str | None:
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return None  # it is something else that is not there
    for codes, text in _ADVICE.items():
        if error.errno in codes:
            return text.format(path=path, folder=path.parent, reason=os.strerror(error.errno))
    return None


def discard(folder: Path) -> None:
    """Delete a member in such a way that it is never taken for whole when it is not, even if this process is killed."""
    if isinstance(folder, ObjectPath):
        _discard_objects(folder)
        return
    condemned = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(condemned, ignore_errors=True)
    folder.rename(condemned)
    shutil.rmtree(condemned)


def _discard_objects(folder: ObjectPath) -> None:
    """Make a member an unfinished one of the same identity first, which lacks one shard after another, and then none."""
    identity = folder / PROGRESS / IDENTITY_NAME
    if (folder / MEMBER_NAME).exists():
        write_json(identity, read_json(folder / MEMBER_NAME)["identity"])
        (folder / MEMBER_NAME).unlink()
    folder.remove_below(but=identity)
    identity.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder of which nothing is needed any more, if it is there; killed meanwhile, some of it may be left."""
    if isinstance(folder, ObjectPath):
        folder.remove_below()
    elif folder.exists():
        shutil.rmtree(folder)


def remove_leftovers(folder: Path, *, shared: bool) -> None:
    """Remove temporary files of processes that were killed while writing.

    Args:
        shared (`bool`): Other processes may be writing here: what may be theirs is left alone.
    """
    if isinstance(folder, ObjectPath):
        return  # what is not whole has no name there
    for temporary in folder.glob(f".*{TEMPORARY}"):
        _, host, process, _ = ("", "", "", *temporary.name.rsplit(".", 3))[-4:]
        is_written = is_running(int(process)) if host == _host() and process.isdecimal() else shared
        if temporary.is_file() and not is_written:
            temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine, not this one, is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
