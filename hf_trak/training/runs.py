"""Records of training runs: what decided one, whether it finished, where it can go on; and the random subsets of rows.

A run that was begun with the same settings goes on from the last checkpoint it wrote; one that finished is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_trak.hashing import hash_json, random_bits, stream_key
from hf_trak.members import Members
from hf_trak.storage.differences import list_differences
from hf_trak.storage.files import read_json, write_atomically, write_json
from hf_trak.training_args import AttributionArguments

_RECORD = "run.json"
_MASKS = "masks.safetensors"
# The arguments that decide the weights a run ends with.
_DECISIVE = [
    "subset_alpha",
    "seed",
    "data_seed",
    "full_determinism",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "auto_find_batch_size",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "tf32",
    "load_best_model_at_end",
    "metric_for_best_model",
    "world_size",
]


def describe_run(args: AttributionArguments, model: Any, dataset: Any) -> dict[str, Any]:
    """Return what decides a run, but for the initial weights and the code."""
    settings = {name: getattr(args, name) for name in _DECISIVE if hasattr(args, name)}
    plain = {
        name: value if isinstance(value, (int, float, str, type(None))) else str(value) for name, value in settings.items()
    }
    members = Members.parse(args.members)
    shapes = {name: [list(p.shape), p.requires_grad] for name, p in model.named_parameters()}
    return {
        # An ensemble of runs may grow: those there are stay what they were.
        "members": args.members if members.is_single_run else members.kind,
        **plain,
        "model_class": type(model).__name__,
        "parameters_sha256": hash_json(shapes),
        "dataset": getattr(dataset, "_fingerprint", None) or type(dataset).__name__,
        "n_rows": len(dataset) if hasattr(dataset, "__len__") else None,
    }


@dataclass(frozen=True)
class RunRecord:
    """The record of a run, in a folder of its own.

    Args:
        folder (`Path`): Holds the record.
        checkpoints (`Path`): Holds the Trainer's `checkpoint-*` folders.
        settings (`dict`): From [`describe_run`].
    """

    folder: Path
    checkpoints: Path
    settings: dict[str, Any]

    @property
    def _path(self) -> Path:
        return self.folder / _RECORD

    def differences(self) -> list[str]:
        """Return one line per setting in which the run recorded here differs from this one; none if there is no record."""
        return list_differences(read_json(self._path)["settings"], self.settings) if self._path.is_file() else []

    def result(self) -> dict[str, Any] | None:
        """Return what a finished run reported; None if it has not finished or was another."""
        if not self._path.is_file() or self.differences():
            return None
        return read_json(self._path)["result"]

    def checkpoint(self) -> Path | None:
        """Return the last whole checkpoint of an unfinished run of these settings."""
        if not self._path.is_file() or self.differences() or self.result() is not None:
            return None
        begun = self._path.stat().st_mtime_ns
        # The Trainer writes its state last; what is older than the record was another run's.
        states = [path for path in self.checkpoints.glob("checkpoint-*/trainer_state.json") if path.stat().st_mtime_ns >= begun]
        return max((path.parent for path in states), key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def begin(self) -> None:
        """Record that the run is about to begin."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"settings": self.settings, "result": None})

    def finish(self, result: dict[str, Any]) -> None:
        """Record that the run has finished."""
        write_json(self._path, {"settings": self.settings, "result": result})


def draw_masks(n_rows: int, n_subsets: int, *, alpha: float, seed: int) -> Bool[Tensor, "n_subsets n_train"]:
    """Draw subsets of round(alpha · n_rows) rows each, independent of each other and the same on every machine.

    Raises:
        ValueError: If a subset would be empty or everything.
    """
    size = round(alpha * n_rows)
    if not 0 < size < n_rows:
        raise ValueError(f"Subsets of {alpha:g} of {n_rows} rows would have {size} rows; choose another `subset_alpha`.")
    order = [random_bits(stream_key(seed, "subset", number), torch.arange(n_rows)).argsort() for number in range(n_subsets)]
    return torch.stack(order).argsort(1) < size


def save_masks(folder: Path, masks: Bool[Tensor, "n_subsets n_train"]) -> None:
    """Write the masks of subset runs beside their snapshots."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MASKS, lambda temporary: save_file({"masks": masks.contiguous()}, temporary))


def load_masks(folder: Path) -> Bool[Tensor, "n_subsets n_train"]:
    """Read the masks that [`save_masks`] wrote."""
    return load_file(folder / _MASKS)["masks"]
