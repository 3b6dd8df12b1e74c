"""Uploads of a trained model leave out the indexes that lie in its output folder: features have a repository and a licence of their own."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer

from hf_trak.config import CONFIG_NAME
from hf_trak.storage.files import TEMPORARY

INDEX_FOLDER = "index"
MEMBERS_FOLDER = "members"


def find_indexes(folder: Path) -> list[Path]:
    """Return the folders below `folder` that hold an index, relative to it."""
    found = sorted(path.parent.relative_to(folder) for path in folder.rglob(CONFIG_NAME))
    return [path for path in found if path != Path()]


def patterns_of_indexes(folder: Path) -> list[str]:
    """Return patterns for `upload_folder(ignore_patterns=...)` that leave out every index below `folder`, and unfinished files."""
    # `trainer.featurize()` may begin while an upload runs in the background, so its folder is named even if it is not there yet.
    names = dict.fromkeys([INDEX_FOLDER, *(path.as_posix() for path in find_indexes(folder))])
    return [*(f"{glob.escape(name)}/*" for name in names), f"{MEMBERS_FOLDER}/.*{TEMPORARY}/*"]


@contextmanager
def without_indexes() -> Iterator[None]:
    """Make `Trainer`'s uploads leave out indexes.

    `Trainer` passes fixed patterns to the `upload_folder` of the client that transformers shares, and has no argument for more.
    """
    client: Any = transformers.trainer.hf_api()
    upload_folder, is_own = client.upload_folder, "upload_folder" in vars(client)

    def upload(*, folder_path: str | Path, ignore_patterns: str | list[str] | None = None, **options: Any) -> Any:
        given = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or [])
        patterns = patterns_of_indexes(Path(folder_path).expanduser().resolve())
        return upload_folder(folder_path=folder_path, ignore_patterns=[*given, *patterns], **options)

    client.upload_folder = upload
    try:
        yield
    finally:
        if is_own:
            client.upload_folder = upload_folder
        else:
            del client.upload_folder
