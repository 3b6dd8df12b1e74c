"""Files that are written whole or not at all, at once on disk, with advice where a disk refuses."""

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

TEMPORARY = ".tmp"  # ends the names of files that are not whole

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
    """Write a JSON file as [`write_once`] does, and return whether it was written here."""
    return write_once(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically, with a hash of its content, which [`read_sealed`] checks."""
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
    sizes = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a link that leads nowhere, or a file that another process removes now
                sizes[entry.name] = entry.stat().st_size
    return sizes


def file_size(path: Path) -> int | None:
    """Return the bytes of a file; None if there is none."""
    if isinstance(path, ObjectPath):
        return path.size()
    return path.stat().st_size if path.exists() else None


def refuse_url(path: Path) -> None:
    """Refuse a URL where a local file or folder is written: `Path` would make a folder of that name of it.

    Raises:
        ValueError: If it is one.
    """
    if path.parts and _SCHEME.fullmatch(path.parts[0]):
        url = f"{path.parts[0]}//{'/'.join(path.parts[1:])}"
        raise ValueError(
            f"{url} is a URL, where a local name is expected. Write to a local one, and copy what was written from there."
        )


def write_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there; an object store has none.

    Raises:
        OSError: With advice, as [`write_atomically`] has it.
        ValueError: If it is a URL, which `Path` would make a folder of that name of.
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
        with suppress(OSError):  # what is wrong has been said above
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return the name that this process gives to a file until it is whole."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}{TEMPORARY}")


def name_of_temporary(name: str) -> str | None:
    """Return the name that a temporary file of [`write_atomically`] would have had when whole; None for any other file."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return None if found is None else found["name"]


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
    """Return what to tell of an error of the disk while `path` was written; None for an error of something else."""
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return None  # it is something else that is not there
    for codes, text in _ADVICE.items():
        if error.errno in codes:
            return text.format(path=path, folder=path.parent, reason=os.strerror(error.errno))
    return None


def ended_temporaries(path: Path) -> list[Path]:
    """Return the temporary files of one file that processes of this machine left which are not there now, or this one did."""
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
        is_ours (`Callable`): Given the name that the whole file would have had, whether such a file is written here. Other temporary
            files are left alone.
        shared (`bool`): Other processes may be writing here: what may be theirs is left alone.
        keep (`Sequence[Path]`): Temporary files that are left alone.
    """
    if isinstance(folder, ObjectPath):
        return  # what is not whole has no name there
    for temporary in folder.glob(f".*{TEMPORARY}"):
        found = _TEMPORARY_NAME.fullmatch(temporary.name)
        if found is None or not is_ours(found["name"]) or not temporary.is_file() or temporary in keep:
            continue
        is_written = is_running(int(found["process"])) if found["host"] == _host() else shared
        if not is_written:
            with suppress(OSError):  # it does no harm on a disk that may only be read
                temporary.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; of a link, the link alone.

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
    """Return whether a process of this machine, not this one, is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
