"""The checkpoints that `Trainer` writes while it trains: which are whole, and the last of them."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_SET_ASIDE = "_damaged-"  # a name that neither `Trainer` counts nor an upload takes along
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")
_STATES = ("optimizer.pt", "scheduler.pt")


def last_checkpoint(folder: Path, *, since_ns: int, world_size: int) -> Path | None:
    """Return the last whole checkpoint in a folder; later ones that are not are renamed, each with a line that says why.

    Args:
        since_ns (`int`): When the run began, as a file's `st_mtime_ns`. What is older was another run's.
        world_size (`int`): How many processes train; each has random numbers of its own.
    """
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _is_checkpoint(path)}
    for _, path in sorted(found.items(), reverse=True):
        state = path / "trainer_state.json"
        if (state if state.exists() else path).stat().st_mtime_ns < since_ns:
            continue
        damage = find_damage(path, world_size=world_size)
        if damage is None:
            return path
        logger.warning("%s cannot be gone on from and is set aside as %s: %s.", path, _set_aside(path).name, damage)
    return None


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def _set_aside(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"{_SET_ASIDE}{number}-{path.name}")).exists():
        number += 1
    return path.rename(target)


def find_damage(checkpoint: Path, *, world_size: int) -> str | None:
    """Return what is wrong with a checkpoint in a few words; None if a run can go on from it."""
    random_numbers = ["rng_state.pth"] if world_size <= 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    scaler = ["scaler.pt"] if (checkpoint / "scaler.pt").exists() else []
    return (
        _damage_of_state(checkpoint / "trainer_state.json")
        or _damage_of_weights(checkpoint)
        or next(filter(None, (_damage_of_archive(checkpoint / name) for name in (*_STATES, *random_numbers, *scaler))), None)
    )


def _damage_of_state(path: Path) -> str | None:
    if not path.is_file():
        return f"it holds no {path.name}, so that writing it was not finished"
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{path.name} is damaged ({type(error).__name__}: {error})"
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return f"{path.name} holds no global_step"
    return None


def _damage_of_weights(checkpoint: Path) -> str | None:
    """Check the weights at the top, or, of several adapters, those in folders below."""
    names = [path for name in _WEIGHTS if (path := checkpoint / name).is_file()]
    names += sorted(checkpoint.glob("*/adapter_model.safetensors"))
    if not names:
        return f"it holds no weights ({', '.join(_WEIGHTS[:3])})"
    for path in names:
        damage = _damage_of_shards(path) if path.suffix == ".json" else _damage_of_file(path)
        if damage is not None:
            return damage
    return None


def _damage_of_shards(index: Path) -> str | None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index.name} is damaged ({type(error).__name__}: {error})"
    return next(filter(None, (_damage_of_file(index.with_name(name)) for name in shards)), None)


def _damage_of_file(path: Path) -> str | None:
    if path.suffix != ".safetensors":
        return _damage_of_archive(path)
    if not path.is_file():
        return f"it holds no {path.name}"
    try:
        with safe_open(path, framework="pt") as file:  # compares the file's size with what its header says
            file.keys()
    except (SafetensorError, OSError) as error:
        return f"{path.name} is damaged ({error})"
    return None


def _damage_of_archive(path: Path) -> str | None:
    """Check a file of `torch.save`, a zip archive whose parts have checksums."""
    if not path.is_file():
        return f"it holds no {path.name}"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{path.name} is damaged ({error})"
    return f"{path.name} is damaged (checksum of {bad})" if bad else None
