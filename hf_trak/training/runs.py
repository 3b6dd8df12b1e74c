"""Records of training runs: what decided one, whether it finished, where it can go on; and the random subsets of rows.

A run that was begun with the same settings goes on from the last checkpoint it wrote; one that finished is not repeated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_trak.hashing import random_bits, stream_key
from hf_trak.storage.files import read_json, write_atomically, write_json
from hf_trak.training.checkpoints import last_checkpoint
from hf_trak.training.run_identity import compare_weights, list_run_differences

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
_MASKS = "masks.safetensors"


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
        return self.folder / RECORD_NAME

    def _recorded(self) -> dict[str, Any] | None:
        """Return what is recorded; None if nothing is.

        Raises:
            ValueError: If the record is damaged.
        """
        if not self._path.is_file():
            return None
        found = read_json(self._path)
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict) or "result" not in found:
            raise ValueError(f"{self._path} is damaged: it records no run. Delete it, and training starts again.")
        return found

    def differences(self) -> list[str]:
        """Return one line per setting in which the run recorded here differs from this one; none if there is no record."""
        found = self._recorded()
        return [] if found is None else list_run_differences(found["settings"], self.settings)

    def difference_of_weights(self) -> tuple[bool, str | None]:
        """Return whether the initial weights may be those of the run recorded here, and a line that says how they differ, if they do."""
        found = self._recorded()
        return (True, None) if found is None else compare_weights(found["settings"], self.settings)

    def result(self) -> dict[str, Any] | None:
        """Return what a finished run reported; None if it has not finished or was another."""
        found = self._recorded()
        return None if found is None or self.differences() else found["result"]

    def checkpoint(self) -> Path | None:
        """Return the last whole checkpoint of an unfinished run of these settings.

        What keeps one from being used is said: settings that differ, with both values, or what is damaged.
        """
        found = self._recorded()
        if found is None or found["result"] is not None:
            return None
        is_same, weights = self.difference_of_weights()
        lines = [*self.differences(), *([] if is_same or weights is None else [weights])]
        if lines:
            logger.warning(
                "%s records an unfinished run of other settings, so training starts again:\n%s",
                self._path,
                "\n".join(f"  {line}" for line in lines),
            )
            return None
        if self.settings["arguments"]["save_only_model"]:
            if any(self.checkpoints.glob("checkpoint-*")):
                logger.warning("Checkpoints hold the weights alone (save_only_model=True), so training starts again.")
            return None
        # The Trainer writes its state last; what is older than the record was another run's.
        last = last_checkpoint(
            self.checkpoints, since_ns=self._path.stat().st_mtime_ns, world_size=self.settings["arguments"]["world_size"]
        )
        if last is not None and weights is not None:
            logger.warning(
                "Training goes on from %s, whose run began with other weights. Pass resume_from_checkpoint=False to start again. "
                "The %s.",
                last,
                weights,
            )
        return last

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
