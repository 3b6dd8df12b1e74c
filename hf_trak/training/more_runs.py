"""The further runs of `members="runs:M"` and `"subsets:M"`, on the trainer that made the main one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import Trainer, TrainerState, enable_full_determinism, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from hf_trak.hashing import stream_key
from hf_trak.members import INITIAL, Members
from hf_trak.storage.files import write_atomically
from hf_trak.storage.snapshots import is_snapshot, refuse_other, remove_snapshot, remove_trained
from hf_trak.training.callback import check_writable
from hf_trak.training.model_upload import MEMBERS_FOLDER
from hf_trak.training.random_state import random_state_kept
from hf_trak.training.run_identity import describe_run
from hf_trak.training.runs import RECORD_NAME, RunRecord, draw_masks, save_masks
from hf_trak.training.snapshots import check_can_save, check_room, is_adapter, load_snapshot, save_snapshot

logger = logging.getLogger(__name__)

_WORK = "_runs"  # a name that the Trainer does not upload
_STATE = "trainer_state.json"
# What a run changes of its trainer, and what the main run's user finds there afterwards.
_KEPT = (
    "args",
    "model",
    "model_wrapped",
    "optimizer",
    "lr_scheduler",
    "state",
    "control",
    "train_dataset",
    "_train_batch_size",
)


class MoreRuns:
    """Trains an ensemble on one trainer, so that whatever its user overrode, or gave it, holds for every run.

    Args:
        trainer (`Trainer`): Whose `train()` this is. Its arguments are [`AttributionArguments`].
        members (`Members`): Of the kind runs or subsets.
        train_once (`Callable`): `(record, resume_from_checkpoint, ignore_keys_for_eval) -> TrainOutput`, one run of the trainer.
    """

    def __init__(self, trainer: Trainer, members: Members, train_once: Callable[..., TrainOutput]) -> None:
        if trainer.args.base == INITIAL and trainer.model_init is not None:
            raise ValueError(
                f"base='initial' are the weights that all runs begin with, and `model_init` makes others for each of members={trainer.args.members!r}. "
                "Give a model in place of `model_init`, or another `base`."
            )
        self.trainer = trainer
        self.members = members
        self.train_once = train_once
        self.folder = Path(trainer.args.output_dir) / MEMBERS_FOLDER
        self.work = Path(trainer.args.output_dir) / _WORK
        self.settings: dict[str, Any] = {}
        self.main = "run-0000" if members.kind == "runs" else "full"
        first = 1 if members.kind == "runs" else 0
        self.names = [f"{members.kind.removesuffix('s')}-{number:04d}" for number in range(first, members.count)]
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise ValueError(
                "`optimizers` belong to one run, and these members take several. Give `optimizer_cls_and_kwargs`, or override "
                "`create_optimizer`."
            )

    def train(self, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """Make the main run, if it is not finished, and then the runs that are missing; leave the main run's model."""
        trainer = self.trainer
        check_can_save(trainer.args, trainer.model, trainer.processing_class)
        with random_state_kept():
            self.settings = describe_run(trainer, self.settings)
        record = RunRecord(self.folder, Path(trainer.args.output_dir), self.settings)
        masks = self._begin(record)
        callbacks = _callback_states(trainer)
        output = self._main_run(record, resume_from_checkpoint, ignore_keys_for_eval)
        missing = [(i, name) for i, name in enumerate(self.names) if not is_snapshot(self.folder / name)]
        trainer.accelerator.wait_for_everyone()  # all have counted before one is added
        for number, name in missing:
            logger.warning("Run %s, %d of %d.", name, number + 1, len(self.names))
            with self._set_aside():
                _restore_callbacks(trainer, callbacks)
                self._run(name, None if masks is None else masks[number], ignore_keys_for_eval)
        if trainer.is_world_process_zero():
            if trainer.args.base != INITIAL:
                remove_snapshot(self.folder / INITIAL)
            if self.work.is_dir() and not any(self.work.iterdir()):
                self.work.rmdir()
        return output

    def _begin(self, record: RunRecord) -> Bool[Tensor, "n_subsets n_train"] | None:
        """Refuse runs of other settings; record the masks and the initial weights, or start from those recorded."""
        trainer = self.trainer
        lines = record.differences()
        if lines:
            raise ValueError(
                f"{self.folder} holds runs of other settings:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nChoose another `output_dir`, or delete that folder."
            )
        _, weights = record.difference_of_weights()
        if weights is not None:
            logger.warning(
                "%s holds runs that began with other weights, and further ones begin with those. The %s.", self.folder, weights
            )
        if trainer.is_world_process_zero():
            self._check_place()
        masks = None
        if self.members.kind == "subsets":
            masks = draw_masks(
                len(trainer.train_dataset), self.members.count, alpha=trainer.args.subset_alpha, seed=trainer.args.seed
            )
            if trainer.is_world_process_zero():
                save_masks(self.folder, masks)
        initial, runs = self.folder / INITIAL, [self.folder / name for name in (self.main, *self.names)]
        begun, finished = is_snapshot(initial), all(is_snapshot(run) for run in runs)
        trainer.accelerator.wait_for_everyone()  # all have looked before anything is written
        if trainer.model_init is None and begun:
            self._load(initial)
        elif trainer.model_init is None and not finished and trainer.is_world_process_zero():
            save_snapshot(initial, trainer.model)
        trainer.accelerator.wait_for_everyone()
        return masks

    def _check_place(self) -> None:
        """Check that all snapshots can be written, and that nothing else has their names."""
        check_writable(self.folder)
        names = [self.main, *self.names, INITIAL]
        for name in names:
            refuse_other(self.folder / name)
            if (self.work / name).exists() and not (self.work / name / RECORD_NAME).is_file():
                raise FileExistsError(
                    f"{self.work / name} is needed for a run, and is not one. Move it, or choose another `output_dir`."
                )
        check_room(self.folder, self.trainer.model, sum(not is_snapshot(self.folder / name) for name in names))

    def _load(self, snapshot: Path) -> None:
        """Load a snapshot's weights into the trainer's model."""
        trainer = self.trainer
        if is_adapter(trainer.model):
            trainer._load_from_checkpoint(str(snapshot))
        else:
            load_snapshot(snapshot, trainer.model)

    def _main_run(
        self, record: RunRecord, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        trainer, snapshot = self.trainer, self.folder / self.main
        result = record.result()
        if result is None or not is_snapshot(snapshot):
            output = self.train_once(record, resume_from_checkpoint, ignore_keys_for_eval)
            if trainer.is_world_process_zero():
                save_snapshot(snapshot, trainer.model, trainer.processing_class)
                write_atomically(self.folder / _STATE, lambda temporary: trainer.state.save_to_json(str(temporary)))
                record.finish(output._asdict())
            return output
        logger.warning("%s holds a finished run of these settings: it is loaded and not repeated.", snapshot)
        self._load(snapshot)
        trainer.state = self._read_state(result)
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        return TrainOutput(**result)

    def _read_state(self, result: dict[str, Any]) -> TrainerState:
        """Return the finished main run's state; without its logs if the file is damaged, which decides no weights."""
        path = self.folder / _STATE
        try:
            return TrainerState.load_from_json(str(path))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is damaged, and the finished run's logs are lost: %s.", path, error)
            return TrainerState(
                global_step=result["global_step"], max_steps=result["global_step"], epoch=result["metrics"].get("epoch")
            )

    def _run(self, name: str, mask: Bool[Tensor, " n_train"] | None, ignore_keys_for_eval: list[str] | None) -> None:
        """Train one further run and keep its snapshot."""
        trainer = self.trainer
        work = self.work / name
        # Neighbouring seeds would give runs the same orders of rows, one epoch apart.
        seed = stream_key(trainer.args.seed, name) % 2**31
        trainer.args = copy.copy(trainer.args)
        trainer.args.output_dir, trainer.args.push_to_hub, trainer.args.seed = str(work), False, seed
        trainer.train_dataset = trainer.train_dataset if mask is None else _subset(trainer.train_dataset, mask)
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.dataloader_config.data_seed = None if trainer.args.data_seed is None else seed
        (enable_full_determinism if trainer.args.full_determinism else set_seed)(seed)
        if trainer.model_init is None:
            self._load(self.folder / INITIAL)
        record = RunRecord(work, work, describe_run(trainer, self.settings, subset=name))
        self.train_once(record, None, ignore_keys_for_eval)
        if trainer.is_world_process_zero():
            save_snapshot(self.folder / name, trainer.model, trainer.processing_class)
            remove_trained(work)
        trainer.accelerator.wait_for_everyone()

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Put the main run's model, state and random numbers aside; give them back afterwards."""
        trainer, handler = self.trainer, self.trainer.callback_handler
        kept = {name: getattr(trainer, name) for name in _KEPT}
        weights = {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}
        data_seed = trainer.accelerator.dataloader_config.data_seed
        handled = {
            name: getattr(handler, name) for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "callbacks")
        }
        states = _callback_states(trainer)
        # The main run's reports are not mixed with the others'.
        handler.callbacks = [c for c in handler.callbacks if not type(c).__module__.startswith("transformers.integrations")]
        try:
            with random_state_kept():
                yield
        finally:
            for name, value in kept.items():
                setattr(trainer, name, value)
            for name, value in handled.items():
                setattr(handler, name, value)
            trainer.accelerator.dataloader_config.data_seed = data_seed
            trainer.model.load_state_dict(weights)
            trainer.model.zero_grad()
            _restore_callbacks(trainer, states)


def _subset(dataset: Any, mask: Bool[Tensor, " n_train"]) -> Any:
    rows = mask.nonzero().flatten().tolist()
    return dataset.select(rows) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, rows)


def _callback_states(trainer: Trainer) -> dict[int, dict[str, Any]]:
    """Return what callbacks remember of a run, such as how long nothing has improved."""
    callbacks = trainer.callback_handler.callbacks
    return {id(c): copy.deepcopy(c.state()["attributes"]) for c in callbacks if isinstance(c, ExportableState)}


def _restore_callbacks(trainer: Trainer, states: dict[int, dict[str, Any]]) -> None:
    for callback in trainer.callback_handler.callbacks:
        for name, value in states.get(id(callback), {}).items():
            setattr(callback, name, copy.deepcopy(value))
