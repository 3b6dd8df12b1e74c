"""Repositories move; the commit that something was loaded at does not."""

from __future__ import annotations

from pathlib import Path

from hf_trak.sources.repositories import look_up


def pinned_revision(source: str | None, revision: str | None = None) -> str | None:
    """Return the commit of a model repository that `revision` stands for now; `revision` itself for a folder.

    Everything of a checkpoint is then loaded at this one commit, which an index records.

    Args:
        source (`str`, *optional*): A folder or model repository; None for a model in memory.

    Raises:
        FileNotFoundError: If the repository does not exist, or is out of reach and not in the local cache.
    """
    if source is None or Path(source).is_dir():
        return revision
    return look_up(source, revision).commit or revision
