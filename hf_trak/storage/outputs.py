"""Files of results: room for them is reserved before work begins, and they appear under their names when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_trak.storage.files import advise, remove_leftovers, temporary_name, write_folder

_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def output_file(path: Path, *, n_bytes: int, unfinished: Path | None = None) -> Iterator[Path]:
    """Give the name of a file with room for `n_bytes`, which becomes `path` when the block ends; after an error it is removed.

    Files that killed processes left of the same result are removed.

    Args:
        unfinished (`Path`, *optional*): The name to give; by default one of this process alone.

    Raises:
        OSError: Naming `path`, if it may not be written or there is no room; before the block, so that nothing is computed for it.
    """
    write_folder(path.parent)
    temporary = unfinished or temporary_name(path)
    with naming(path):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a file is to be written; choose another name.")
        remove_leftovers(path.parent, lambda name: name == path.name, shared=False)
    try:
        with naming(path), open(temporary, "wb") as file:
            reserve(file.fileno(), n_bytes, path)
        yield temporary
        with naming(path):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def reserve(file: int, n_bytes: int, path: str | Path) -> None:
    """Reserve room for an open file, where the file system can.

    Raises:
        OSError: If there is none.
    """
    if not hasattr(os, "posix_fallocate") or n_bytes < 1:
        return
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except OSError as error:
        if error.errno in _CANNOT_RESERVE:
            return
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(Path(path).parent).free
        raise OSError(
            error.errno,
            f"The disk is full: {path} needs up to {n_bytes:,} bytes, and {free:,} are free. It was not written; free some space, or choose "
            "another disk, and run again.",
        ) from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file, and what to do, in errors of the disk."""
    try:
        yield
    except OSError as error:
        advice = None if error.errno is None or str(path) in str(error.strerror) else advise(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error
