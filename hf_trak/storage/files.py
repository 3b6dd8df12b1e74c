"""Atomic writes of files, flushed to disk, with errors that say what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hf_trak.hashing import hash_json
from hf_trak.messages import DamagedFile
from hf_trak.storage.object_store import ObjectPath

TEMPORARY = ".tmp"  # suffix of incomplete files

_SEAL = "sha256"
_LARGEST_JSON = 64 << 20
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_TEMPORARY_NAME = re.compile(rf"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<process>\d+){re.escape(TEMPORARY)}")

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: If it is damaged, is too large or too deeply nested, or holds something else.
    """
    size = file_size(path)
    if size is not None and size > _LARGEST_JSON:
        raise _damaged_json(path, f"it has {size:,} bytes, where at most {_LARGEST_JSON:,} are expected")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise _damaged_json(path, "it is nested too deeply") from None
    except ValueError as error:
        raise _damaged_json(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged_json(path, f"it holds {_KINDS.get(type(value), 'a number')}, where an object {{...}} is expected")
    return value


def _damaged_json(path: Path, reason: str) -> ValueError:
    said = f"{path} is damaged: {reason}. Restore it from a copy, or delete it and run again what wrote it."
    return DamagedFile(said, reason=reason)


def field_of(path: Path, values: dict[str, Any], name: str, kind: type[T]) -> T:
    """Return a field of an object read from a JSON file.

    Raises:
        ValueError: If it is missing, or of another type.
    """
    value = values.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        what = "is missing" if name not in values else f"holds {_KINDS.get(type(value), 'a number')}"
        raise _damaged_json(path, f"{name!r} {what}, where {_KINDS.get(kind, 'a number')} is expected")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_json_once(path: Path, value: dict[str, Any]) -> bool:
    """Write a JSON file as [`write_once`] does, and return whether this call wrote it."""
    return write_once(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically, with a hash of its content that [`read_sealed`] checks."""
    write_json(path, {**value, _SEAL: hash_json(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON file that [`write_sealed`] wrote.

    Raises:
        ValueError: If it is damaged, or has been changed since.
    """
    value = read_json(path)
    if value.pop(_SEAL, None) != hash_json(value):
        raise _damaged_json(path, "it has been changed since it was written")
    return value


def read_jsons(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read those of the named JSON files that exist in a folder.

    Raises:
        ValueError: If one is damaged.
    """
    if not isinstance(folder, ObjectPath):
        return {name: read_json(folder / name) for name in names if (folder / name).exists()}
    found = folder.read_all(names)
    return {name: _parse_json(folder / name, found[name]) for name in names if name in found}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file in a folder; an empty dict if there is no folder."""
    if isinstance(folder, ObjectPath):
        return folder.sizes()
    sizes = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a dangling link, or a file that another process is removing
                sizes[entry.name] = entry.stat().st_size
    return sizes


def file_size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is no file."""
    if isinstance(path, ObjectPath):
        return path.size()
    return path.stat().st_size if path.exists() else None


def refuse_url(path: Path) -> None:
    """Refuse a URL as the name of a local file or folder. `Path` would create a folder with the URL as its name.

    Raises:
        ValueError: If `path` is a URL.
    """
    if path.parts and _SCHEME.fullmatch(path.parts[0]):
        url = f"{path.parts[0]}//{'/'.join(path.parts[1:])}"
        raise ValueError(
            f"{url} is a URL, where a local name is expected. Write to a local one, and copy what was written from there."
        )


def write_folder(path: Path) -> None:
    """Create a folder and its parents if they do not exist. Object stores have no folders.

    Raises:
        OSError: With advice, as in [`write_atomically`].
        ValueError: If `path` is a URL; see [`refuse_url`].
    """
    if isinstance(path, ObjectPath):
        return
    refuse_url(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = advise(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it. On an object store, upload it.

    Raises:
        OSError: With advice, if the disk is full, or if the folder is read-only or missing. The temporary file is removed and nothing
            else changes.
    """
    if isinstance(path, ObjectPath):
        path.put(write)
    else:
        _write(path, write, os.replace)


def write_once(path: Path, write: Callable[[Path], Any]) -> bool:
    """Write a file as [`write_atomically`] does, unless it exists. If several processes call this at once, one succeeds.

    Returns:
        `bool`: Whether this call wrote the file.
    """
    if isinstance(path, ObjectPath):
        return path.put_once(write)
    try:
        _write(path, write, _link)
    except FileExistsError:
        return False
    return True


def _write(path: Path, write: Callable[[Path], Any], name: Callable[[Path, Path], Any]) -> None:
    temporary = temporary_name(path)
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
        advice = advise(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error
    finally:
        with suppress(OSError):  # the error above says what is wrong
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return the temporary name of a file that this process is writing."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}{TEMPORARY}")


def name_of_temporary(name: str) -> str | None:
    """Return the final name of a temporary file of [`write_atomically`]; None for any other file."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return None if found is None else found["name"]


def _host() -> str:
    """Return the name of this machine. Temporary file names contain it, because several machines may share a folder."""
    return socket.gethostname().replace(".", "-")


def _link(temporary: Path, path: Path) -> None:
    """Give a temporary file its final name, unless a file of that name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            raise
        # A file system without hard links: another process may write the same file between these two lines.
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
    "raise the limit, or write less to a file: a smaller shard_rows, fewer hits.",
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


def advise(error: OSError, path: Path) -> str | None:
    """Return the message for a disk error that occurred while `path` was written; None for other errors."""
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return None  # something else is missing
    for codes, text in _ADVICE.items():
        if error.errno in codes:
            return text.format(path=path, folder=path.parent, reason=os.strerror(error.errno))
    return None


def ended_temporaries(path: Path) -> list[Path]:
    """Return the temporary files of one file that belong to this process or to processes of this machine that have ended."""
    found = []
    for temporary in path.parent.glob(f".*{TEMPORARY}"):
        parts = _TEMPORARY_NAME.fullmatch(temporary.name)
        if parts is None or parts["name"] != path.name or parts["host"] != _host() or not temporary.is_file():
            continue
        if not temporary.is_symlink() and not is_running(int(parts["process"])):
            found.append(temporary)
    return sorted(found)


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool], *, shared: bool, keep: Sequence[Path] = ()) -> None:
    """Remove the temporary files of processes that were killed while writing.

    Args:
        is_ours (`Callable`): Given the final name of a file, return whether hf_trak writes such a file here. Other temporary files are
            kept.
        shared (`bool`): Whether other processes may be writing here. Files that may be theirs are kept.
        keep (`Sequence[Path]`): Temporary files to keep.
    """
    if isinstance(folder, ObjectPath):
        return  # object stores have no incomplete files
    for temporary in folder.glob(f".*{TEMPORARY}"):
        found = _TEMPORARY_NAME.fullmatch(temporary.name)
        if found is None or not is_ours(found["name"]) or not temporary.is_file() or temporary in keep:
            continue
        is_written = is_running(int(found["process"])) if found["host"] == _host() else shared
        if not is_written:
            with suppress(OSError):  # harmless on a read-only disk
                temporary.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file if it exists. For a link, remove only the link.

    Raises:
        OSError: With advice, if it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(path, ObjectPath):
            raise
        raise OSError(
            error.errno,
            f"{path} may not be removed: {os.strerror(error.errno or 0)}. Make {path.parent} writable, and run again.",
        ) from error


def is_running(process: int) -> bool:
    """Return whether another process with this number is running on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
