"""Which files were hashed and found to be what was written, remembered so that a file that has not changed is hashed once.

What is remembered lies in a cache, never in the index: an index on a read-only disk is verified like any other. A file counts as
unchanged if its size, its inode and its times of modification and of change are those it had when it was hashed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_trak.hashing import hash_file

_CACHE = "HF_TRAK_CACHE"
_SETTLED_NS = 2_000_000_000  # a file may change again within one tick of its file system's clock

_known: dict[Path, dict[str, str]] = {}  # by cache file: by name, the state of a file and its hash


def cache_folder() -> Path:
    """Return where hf_trak caches: `HF_TRAK_CACHE`, by default `hf_trak` in the folder of the Hub's caches."""
    if _CACHE in os.environ:
        return Path(os.environ[_CACHE])
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_trak"


def is_as_written(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether a local file has the size and the SHA-256 of its `record`; one that was hashed before and has not changed since
    is not hashed again."""
    try:
        state = path.stat()
    except OSError:
        return False
    if state.st_size != record["bytes"]:
        return False
    known = " ".join(
        str(part) for part in (state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns, record["sha256"])
    )
    cache = _cache_file(path.parent)
    if _read(cache).get(path.name) == known:
        return True
    if hash_file(path) != record["sha256"]:
        return False
    if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS:
        _remember(cache, path.name, known)
    return True


def _cache_file(folder: Path) -> Path:
    return cache_folder() / "verified" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _read(cache: Path) -> dict[str, str]:
    if cache not in _known:
        lines = []
        with suppress(OSError):  # there is none yet
            lines = cache.read_text(encoding="utf-8", errors="replace").splitlines()
        parts = [line.partition("\t") for line in lines]
        _known[cache] = {name: known for name, separator, known in parts if separator}
    return _known[cache]


def _remember(cache: Path, name: str, known: str) -> None:
    """Add a line, which is one write: processes that verify the same index at a time do not disturb each other."""
    _read(cache)[name] = known
    if "\n" in name or "\t" in name:
        return
    with suppress(OSError):  # without a cache, files are hashed each time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{known}\n")
