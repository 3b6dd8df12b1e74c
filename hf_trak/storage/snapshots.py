"""Snapshots: folders with a model's files and a list of them, so that only listed files are ever removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_trak.storage.files import TEMPORARY, is_running, read_json, remove_file, temporary_name, write_folder, write_json

LIST_NAME = ".snapshot.json"
# Files that a Trainer writes into the checkpoints of a run, which have no such list.
_TRAINED = re.compile(
    r"(.*_)?config\.json|(adapter_)?model.*\.safetensors(\.index\.json)?|(optimizer|scheduler|scaler|training_args)\.(pt|bin)"
    r"|rng_state.*\.pth|trainer_state\.json|tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|spiece\.model"
    r"|sentencepiece.*|chat_template\..*|run\.json|README\.md|events\.out\.tfevents\..*"
)


def is_snapshot(folder: Path) -> bool:
    """Return whether [`write_snapshot`] wrote a folder."""
    return (folder / LIST_NAME).is_file()


def write_snapshot(folder: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` fill a temporary folder, and rename it to `folder` when it is complete. It replaces an earlier snapshot, whose other
    files are moved to the new one.

    Raises:
        ValueError: If `folder` exists and is not a snapshot. Nothing changes then.
    """
    write_folder(folder.parent)
    _remove_leftovers(folder)
    refuse_other(folder)
    temporary, old = temporary_name(folder), temporary_name(folder.with_name(f"{folder.name}.old"))
    try:
        save(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if not path.is_dir())
    write_json(temporary / LIST_NAME, {"files": files})
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    _empty(old, folder)


def refuse_other(folder: Path) -> None:
    """Refuse a folder that exists and is not a snapshot.

    Raises:
        ValueError: Naming it.
    """
    if folder.is_symlink() or (folder.exists() and not is_snapshot(folder) and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(
            f"{folder} was not written by hf_trak, and a snapshot of that name would replace it. Move it to another folder, or choose "
            "another output folder. Nothing was changed."
        )


def remove_snapshot(folder: Path) -> None:
    """Remove the files of a snapshot, and then its folder if it is empty."""
    if folder.is_symlink() or not is_snapshot(folder):
        return
    names = read_json(folder / LIST_NAME).get("files")
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and not os.path.isabs(name) and ".." not in Path(name).parts:
            remove_file(folder / name)
    remove_file(folder / LIST_NAME)
    _remove_empty(folder)


def remove_trained(folder: Path) -> None:
    """Remove the checkpoints and records that a Trainer wrote into its output folder. Other files stay."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts[:-1]
        if _TRAINED.fullmatch(path.name) and not path.is_dir() and all(_is_checkpoint(part) for part in inside):
            remove_file(path)
    _remove_empty(folder)


def _is_checkpoint(name: str) -> bool:
    return re.fullmatch(r"checkpoint-\d+|runs|(run|subset)-\d+|[A-Z][a-z]{2}\d\d_.*", name) is not None


def _remove_empty(folder: Path) -> None:
    below = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for path in (*below, folder):
        with suppress(OSError):  # it holds something else
            path.rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Remove leftovers of processes that were killed while writing a snapshot. A snapshot that was moved aside is moved back."""
    name = re.compile(rf"\.{re.escape(folder.name)}(?P<old>\.old)?\.[^.]+\.(?P<process>\d+){re.escape(TEMPORARY)}")
    for leftover in sorted(folder.parent.glob(f".{folder.name}.*{TEMPORARY}")):
        found = name.fullmatch(leftover.name)
        if found is None or not leftover.is_dir() or leftover.is_symlink() or is_running(int(found["process"])):
            continue
        if not found["old"]:
            shutil.rmtree(leftover)
        elif folder.exists():
            _empty(leftover, folder)
        else:
            leftover.rename(folder)


def _empty(old: Path, folder: Path) -> None:
    """Remove an earlier snapshot, and move other files of its folder to the new one."""
    if not old.exists():
        return
    remove_snapshot(old)
    for path in sorted(old.rglob("*")) if old.exists() else []:
        target = folder / path.relative_to(old)
        if not path.is_dir() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    if old.exists():
        _remove_empty(old)
