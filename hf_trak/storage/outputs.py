"""Files of results: room for them is reserved before work begins, and they appear under their names when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_trak.storage.files import advise, ended_temporaries, remove_leftovers, temporary_name, write_folder
from hf_trak.storage.replacing import refuse_target

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
    refuse_target(path)
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


class Progress:
    """How much of an unfinished file is done, in a journal next to it, so that a later process goes on.

    Args:
        file (`Path`): The unfinished file.
        journal (`Path`): One line says what the file is of, and each further one how much is done of it.
    """

    def __init__(self, file: Path, journal: Path) -> None:
        self.file = file
        self._journal = journal
        self.done = 0

    def begin(self, identity: str) -> int:
        """Return how much is done; 0 if the file is of something else than `identity`, which is recorded then."""
        lines = []
        with suppress(OSError, UnicodeDecodeError):
            lines = self._journal.read_text(encoding="ascii").split("\n")[:-1]  # the last line may be cut short
        if lines[:1] == [identity] and all(line.isdecimal() for line in lines[1:]):
            self.done = int(lines[-1]) if len(lines) > 1 else 0
        else:
            self._journal.write_text(f"{identity}\n", encoding="ascii")
        return self.done

    def record(self, done: int) -> None:
        """Record how much is done; it must be on disk."""
        self.done = done
        with open(self._journal, "a", encoding="ascii") as journal:
            journal.write(f"{done}\n")


@contextmanager
def resumable_file(path: Path, *, n_bytes: int) -> Iterator[Progress]:
    """Give an unfinished file with room for `n_bytes`, which becomes `path` when the block ends.

    After an error it is kept if something of it is done, and the next call for the same `path`, of any process, goes on with it. One
    that is of something else is removed.

    Raises:
        OSError: As [`output_file`].
    """
    refuse_target(path)
    write_folder(path.parent)
    temporary, noted = temporary_name(path), path.with_name(f"{path.name}.progress")
    progress = Progress(temporary, temporary_name(noted))
    with naming(path):
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a file is to be written; choose another name.")
        _take_over(path, noted, progress)
        remove_leftovers(
            path.parent, lambda name: name in (path.name, noted.name), shared=False, keep=(temporary, progress._journal)
        )
    try:
        with naming(path), open(temporary, "r+b" if temporary.exists() else "wb") as file:
            reserve(file.fileno(), n_bytes, path)
        yield progress
        with naming(path):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        progress.done = 0
    finally:
        if not progress.done:
            for left in (temporary, progress._journal):
                with suppress(OSError):
                    left.unlink(missing_ok=True)


def _take_over(path: Path, noted: Path, progress: Progress) -> None:
    """Give this process's names to an unfinished file, and its journal, of a process that has ended."""
    files = {left.name: left for left in ended_temporaries(path)}
    for journal in ended_temporaries(noted):
        file = files.get(journal.name.replace(f".{noted.name}.", f".{path.name}.", 1))
        if file is not None:
            os.replace(file, progress.file)
            os.replace(journal, progress._journal)
            return


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
