"""Result files: disk space is reserved before work begins, and a file gets its name when it is complete."""

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
    """Yield a file with reserved space for `n_bytes`. It becomes `path` when the block ends, and is removed after an error.

    Incomplete files that killed processes left for the same result are removed.

    Args:
        unfinished (`Path`, *optional*): The name of the incomplete file; by default, a name with this process's number.

    Raises:
        OSError: Naming `path`, if it cannot be written or there is not enough space. It is raised before the block runs.
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
    """The progress of an unfinished file, in a journal beside it, so that a later process can continue.

    Args:
        file (`Path`): The unfinished file.
        journal (`Path`): The first line identifies the result. Each further line is the amount done.
    """

    def __init__(self, file: Path, journal: Path) -> None:
        self.file = file
        self._journal = journal
        self.done = 0

    def begin(self, identity: str) -> int:
        """Return the amount done. If the journal has another identity, record `identity` and return 0."""
        lines = []
        with suppress(OSError, UnicodeDecodeError):
            lines = self._journal.read_text(encoding="ascii").split("\n")[:-1]  # the last line may be incomplete
        if lines[:1] == [identity] and all(line.isdecimal() for line in lines[1:]):
            self.done = int(lines[-1]) if len(lines) > 1 else 0
        else:
            self._journal.write_text(f"{identity}\n", encoding="ascii")
        return self.done

    def record(self, done: int) -> None:
        """Record the amount done. The data must be on disk already."""
        self.done = done
        with open(self._journal, "a", encoding="ascii") as journal:
            journal.write(f"{done}\n")


@contextmanager
def resumable_file(path: Path, *, n_bytes: int) -> Iterator[Progress]:
    """Yield an unfinished file with reserved space for `n_bytes`. It becomes `path` when the block ends.

    After an error the file is kept if a part is done. The next call for the same `path`, in any process, continues it. A file of
    another result is removed.

    Raises:
        OSError: As in [`output_file`].
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
    """Take over an unfinished file and its journal from a process that has ended, by renaming them."""
    files = {left.name: left for left in ended_temporaries(path)}
    for journal in ended_temporaries(noted):
        file = files.get(journal.name.replace(f".{noted.name}.", f".{path.name}.", 1))
        if file is not None:
            os.replace(file, progress.file)
            os.replace(journal, progress._journal)
            return


def reserve(file: int, n_bytes: int, path: str | Path) -> None:
    """Reserve disk space for an open file, if the file system supports it.

    Raises:
        OSError: If there is not enough space.
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
    """Add the file's name and advice to disk errors in the block."""
    try:
        yield
    except OSError as error:
        advice = None if error.errno is None or str(path) in str(error.strerror) else advise(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error
