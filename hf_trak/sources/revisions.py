"""Repositories move; the commit that something was loaded at does not."""

from __future__ import annotations

from pathlib import Path


def pinned_revision(source: str | None, revision: str | None = None) -> str | None:
    """Return the commit of a model repository that `revision` stands for now; `revision` itself for a folder.

    Everything of a checkpoint is then loaded at this one commit, which an index records.

    Args:
        source (`str`, *optional*): A folder or model repository; None for a model in memory.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    if source is None or Path(source).exists():
        return revision
    for name in ("config.json", "adapter_config.json"):
        try:
            path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:  # out of reach: loading it has the better message
            return revision
        if path is not None:
            return extract_commit_hash(path, None) or revision
    return revision
