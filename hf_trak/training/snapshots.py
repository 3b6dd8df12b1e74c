"""Snapshots of weights, and the checkpoints that `Trainer` writes while it trains."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hf_trak.sources.checkpoints import find_model_class
from hf_trak.storage.files import read_json
from hf_trak.storage.snapshots import is_snapshot, remove_snapshot, write_snapshot

logger = logging.getLogger(__name__)

_SET_ASIDE = "_damaged-"  # a name that neither `Trainer` counts nor an upload takes along
_TRAINER_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")
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
    names = [path for name in _TRAINER_WEIGHTS if (path := checkpoint / name).is_file()]
    names += sorted(checkpoint.glob("*/adapter_model.safetensors"))
    if not names:
        return f"it holds no weights ({', '.join(_TRAINER_WEIGHTS[:3])})"
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


_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"


def is_adapter(model: Any) -> bool:
    """Return whether a model is a base model under PEFT adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_plain(model: Any) -> bool:
    """Return whether a model is a module that transformers cannot save."""
    return not hasattr(model, "save_pretrained")


def loads_by_name(model: Any) -> bool:
    """Return whether a snapshot says by itself what class it is of: one of transformers, or a registered one.

    A class of the same name that is defined elsewhere is another class.
    """
    found = type(model.get_base_model() if is_adapter(model) else model)
    return find_model_class(found.__name__) is found


def save_snapshot(
    folder: Path, model: Any, processing_class: Any = None, also: Callable[[Path], Any] = lambda folder: None
) -> None:
    """Save the weights, what turns rows into inputs, and what `also` writes; the folder appears under its name when it is whole.

    A module that is no model of transformers is saved as its `state_dict`, and needs the module again to be loaded: [`load_snapshot`].

    Raises:
        ValueError: If a folder of that name is there and is not a snapshot.
        OSError: If a file cannot be written; what was written of the snapshot is removed.
    """

    def save(temporary: Path) -> None:
        _write_weights(temporary, model)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        also(temporary)

    try:
        write_snapshot(folder, save)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"The snapshot {folder} was not written: {reason}. Training can go on from its last checkpoint."
        ) from error


def _write_weights(folder: Path, model: Any) -> None:
    if is_plain(model):
        from safetensors.torch import save_model

        folder.mkdir(parents=True)
        save_model(model, str(folder / _WEIGHTS))
        return
    model.save_pretrained(folder)
    if is_adapter(model):  # an adapter does not say what class it was added to
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(folder)


def discard_snapshot(folder: Path) -> None:
    """Remove a snapshot; files that somebody else put there stay, in a folder whose name begins with "kept-"."""
    if not is_snapshot(folder):
        return
    remove_snapshot(folder)
    if not folder.exists():
        return
    number = 0
    while (kept := folder.with_name(f"kept-{number}-{folder.name}")).exists():
        number += 1
    folder.rename(kept)  # the name is needed again when the run gets there
    logger.warning("%s held files that are not of a snapshot; they are in %s now.", folder, kept)


def load_snapshot(folder: Path | str, model: nn.Module) -> nn.Module:
    """Load a snapshot's weights into a module of the class that it was taken of, and return the module.

    Raises:
        ValueError: If the weights are not those of this module; the message names them.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    names = [_WEIGHTS]
    if (folder / _WEIGHTS_INDEX).is_file():
        names = sorted(set(read_json(folder / _WEIGHTS_INDEX)["weight_map"].values()))
    weights = {name: value for file in names for name, value in load_file(folder / file).items()}
    found = model.load_state_dict(weights, strict=False)
    missing = _without_tied(found.missing_keys, model.state_dict(), weights)
    if missing or found.unexpected_keys:
        raise ValueError(
            f"The weights in {folder} are not those of this {type(model).__name__}: missing are {_listed(missing)}; unexpected are "
            f"{_listed(found.unexpected_keys)}. Give a module made as the one that was trained."
        )
    return model


def load_copy(folder: Path, model: nn.Module) -> nn.Module:
    """Return a copy of a model, on the CPU, with the weights of a snapshot."""
    result = copy.deepcopy(model).cpu()
    # Mixed precision puts a function in the place of `forward`, which may be of the model that was copied.
    original = vars(result).pop("_original_forward", None)
    if original is not None:
        del result.forward
        if getattr(original, "__func__", original) is not type(result).forward:
            result.forward = original
    return load_snapshot(folder, result)


def check_loaded(loaded: nn.Module, model: nn.Module) -> None:
    """Check that a snapshot was loaded to the weights that it was taken of: all of them, or those that an adapter trains.

    Raises:
        ValueError: Naming the weights that are others.
    """
    ours, theirs = model.state_dict(), loaded.state_dict()
    names = [name for name, p in model.named_parameters() if p.requires_grad] if is_adapter(model) else list(ours)
    changed = [
        name
        for name in names
        if isinstance(ours[name], Tensor)
        and not (name in theirs and torch.equal(ours[name].detach().cpu(), theirs[name].detach().cpu()))
    ]
    if changed:
        raise ValueError(
            f"A snapshot of this {type(model).__name__} does not load to the weights that it was taken of: {_listed(changed)} are others, so "
            "that attribution would be of another model. Give the model as `save_pretrained` and `from_pretrained` keep it, in one dtype."
        )


def _without_tied(names: list[str], state: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose memory no loaded tensor shares: of tied weights, one name is saved."""
    places = {state[name].data_ptr() for name in loaded if name in state}
    return [name for name in names if state[name].data_ptr() not in places]


def _listed(names: list[str]) -> str:
    return (", ".join(names[:5]) + (", ..." if len(names) > 5 else "")) or "none"


def snapshot_bytes(model: Any) -> int:
    """Return about how many bytes a snapshot of a model takes: an adapter's are its own weights."""
    if is_adapter(model):
        tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        tensors = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def check_can_save(args: Any, model: Any, processing_class: Any = None) -> None:
    """Refuse what a snapshot could not be taken of, or could not be loaded from, before anything is trained.

    Raises:
        ValueError: If the weights are spread over processes, an adapter's base model cannot be found again, or a plain module holds
            what safetensors cannot store.
    """
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "Snapshots need the whole weights in each process, which FSDP and DeepSpeed do not keep. Train without."
        )
    if is_adapter(model):
        _check_adapter(model)
    elif is_plain(model):
        _check_plain(args, model)
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}, which cannot be saved with the weights: it has no "
            "`save_pretrained`. Give a tokenizer, image processor or processor of transformers, or a `data_collator` that holds yours."
        )


def _check_adapter(model: Any) -> None:
    if not any(config.base_model_name_or_path for config in model.peft_config.values()):
        raise ValueError(
            "This adapter's base model was made in memory, so snapshots of the adapter could not be loaded again. Save the base "
            "model with `save_pretrained`, and load it from there before adding the adapter."
        )
    if not loads_by_name(model):
        raise ValueError(
            f"This adapter's base model is a {type(model.get_base_model()).__name__}, which is no class of transformers, so snapshots "
            "of the adapter could not be loaded again. Train with the adapter merged into the model."
        )


def _check_plain(args: Any, model: nn.Module) -> None:
    from safetensors.torch import save

    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ValueError(
                f"{name!r} in the `state_dict` of this {type(model).__name__} is a {type(value).__name__}, and a snapshot holds tensors "
                "alone. Run a lazy module once before you train it; make other state a buffer."
            )
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"{name!r} is {'a meta' if value.is_meta else f'a {value.layout}'} tensor, which a snapshot cannot hold."
            )
        save({name: torch.zeros(1, dtype=value.dtype)})  # raises for a dtype that safetensors does not know
    if args.save_strategy != "no" and (names := _shared_names(model)):
        raise ValueError(
            f"{' and '.join(names)} share memory, and `Trainer` cannot write a checkpoint of a plain module whose weights are tied. "
            "Set `save_strategy='no'`; snapshots for attribution are kept all the same."
        )


def _shared_names(model: nn.Module) -> list[str]:
    names: dict[int, str] = {}
    for name, value in model.state_dict().items():
        if value.numel() and value.data_ptr() in names:
            return [names[value.data_ptr()], name]
        names[value.data_ptr()] = name
    return []


def check_room(folder: Path, model: Any, n_snapshots: int) -> None:
    """Refuse a run whose snapshots would not fit on the disk.

    Raises:
        OSError: With what is needed and what is free.
    """
    needed = n_snapshots * snapshot_bytes(model)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{n_snapshots} snapshot{'s' * (n_snapshots > 1)} of the weights need{'s' * (n_snapshots == 1)} {needed / 1e9:.3g} GB in "
            f"{folder}, and {free / 1e9:.3g} GB are free. Free some space, choose another `output_dir`, or keep fewer `members`."
        )
