"""Training runs of an ensemble: records of each, random subsets of rows, and the further runs after the main one.

A run that was begun with the same settings goes on from the last checkpoint it wrote; one that finished is not repeated.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerState, enable_full_determinism, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from hf_trak.hashing import random_bits, stream_key
from hf_trak.members import INITIAL, Members
from hf_trak.messages import list_differences
from hf_trak.storage.files import read_json, write_atomically, write_json
from hf_trak.storage.snapshots import is_snapshot, refuse_other, remove_snapshot, remove_trained
from hf_trak.training.callback import MEMBERS_FOLDER, check_writable
from hf_trak.training.run_identity import compare_weights, describe_run, list_run_differences
from hf_trak.training.snapshots import check_can_save, check_room, is_adapter, last_checkpoint, load_snapshot, save_snapshot


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give back the states of Python's, NumPy's and torch's generators afterwards."""
    states = _read()
    try:
        yield
    finally:
        _write(states)


def _read() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002 (the Trainer's own)


def _write(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])


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


_WORK = "_runs"  # a name that the Trainer does not upload
_STATE = "trainer_state.json"


class MoreRuns:
    """Trains an ensemble: the run of one trainer, and further ones by trainers of the same class, made from the same arguments.

    Args:
        trainer ([`AttributionMixin`]): Whose `train()` this is. Its arguments are [`AttributionArguments`].
        members (`Members`): Of the kind runs or subsets.
        given (`dict`): The arguments that the trainer was made from, from [`constructor_arguments`].

    Raises:
        ValueError: If something that was given belongs to one run.
    """

    def __init__(self, trainer: Any, members: Members, given: dict[str, Any]) -> None:
        if trainer.args.base == INITIAL and trainer.model_init is not None:
            raise ValueError(
                f"base='initial' are the weights that all runs begin with, and `model_init` makes others for each of members={trainer.args.members!r}. "
                "Give a model in place of `model_init`, or another `base`."
            )
        self.trainer = trainer
        self.members = members
        self.given = given
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
        missing = [(i, name) for i, name in enumerate(self.names) if not is_snapshot(self.folder / name)]
        if missing:
            self._check_rebuilt()
        output = self._main_run(record, resume_from_checkpoint, ignore_keys_for_eval)
        trainer.accelerator.wait_for_everyone()  # all have counted before one is added
        for number, name in missing:
            logger.warning("Run %s, %d of %d.", name, number + 1, len(self.names))
            with self._main_kept():
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
            output = trainer._train_once(record, resume_from_checkpoint, ignore_keys_for_eval)
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

    def _rebuild(self, name: str) -> Any:
        """Return a new trainer for a further run, on the main run's model, or on one of its own from `model_init`.

        It does not report to where the main run does, and uploads nothing.
        """
        main = self.trainer
        args = copy.copy(main.args)
        args.push_to_hub, args.report_to = False, []
        # Neighbouring seeds would give runs the same orders of rows, one epoch apart.
        args.seed = stream_key(args.seed, name) % 2**31
        args.data_seed = None if args.data_seed is None else args.seed
        given = {**self.given, "args": args}
        if main.model_init is None:
            given["model"] = main.model
            given["processing_class"] = main.processing_class  # which may have been loaded by the model's name
            if is_adapter(main.model):
                given.pop("peft_config", None)  # the model has it
        trainer = type(main)(**given)
        kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
        for callback in main.callback_handler.callbacks:  # those added since
            if type(callback) not in kinds:
                trainer.add_callback(callback)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__module__.startswith("transformers.integrations"):
                trainer.remove_callback(callback)
        trainer.args.output_dir = str(
            self.work / name
        )  # not before: a trainer makes its folder, and only a run that has a record may
        trainer.train_dataset, trainer.eval_dataset = main.train_dataset, main.eval_dataset  # as the class has prepared them
        return trainer

    def _check_rebuilt(self) -> None:
        """Refuse, before anything is trained, a trainer whose further runs would be of other settings than its own.

        Raises:
            ValueError: If what was changed after the trainer was made is not in the arguments it was made from.
        """
        with random_state_kept():
            found = describe_run(self._rebuild(self.names[0]), {**self.settings, "given": None})["given"]
        if lines := list_differences(found, self.settings["given"]):
            raise ValueError(
                f"members={self.trainer.args.members!r} trains further runs with new trainers, made from the arguments that this "
                f"{type(self.trainer).__name__} was made from, and these differ from it:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nGive what was changed since to the constructor, or override it in a class of your own."
            )

    def _run(self, name: str, mask: Bool[Tensor, " n_train"] | None, ignore_keys_for_eval: list[str] | None) -> None:
        """Train one further run and keep its snapshot."""
        work = self.work / name
        if self.trainer.model_init is None:
            self._load(self.folder / INITIAL)
        trainer = self._rebuild(name)
        if mask is not None:
            trainer.train_dataset = _subset(trainer.train_dataset, mask)
        (enable_full_determinism if trainer.args.full_determinism else set_seed)(trainer.args.seed)
        record = RunRecord(work, work, describe_run(trainer, self.settings, subset=name))
        trainer._train_once(record, None, ignore_keys_for_eval)
        if trainer.is_world_process_zero():
            save_snapshot(self.folder / name, trainer.model, trainer.processing_class)
            remove_trained(work)
        trainer.accelerator.wait_for_everyone()

    @contextmanager
    def _main_kept(self) -> Iterator[None]:
        """Give back the main run's weights, the random numbers and what callbacks remember afterwards."""
        model, states = self.trainer.model, _callback_states(self.trainer)
        weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        try:
            with random_state_kept():
                yield
        finally:
            model.load_state_dict(weights)
            model.zero_grad()
            _restore_callbacks(self.trainer, states)


def constructor_arguments(kind: type, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return by name the arguments that a trainer of this class was made from.

    Raises:
        ValueError: If the class's constructor takes no `model` and `args`, with which another trainer could be made.
    """
    signatures = [list(signature(vars(one)["__init__"]).parameters.values()) for one in kind.__mro__ if "__init__" in vars(one)]
    own = signatures[0]
    rest, others = (
        next((one.name for one in own if one.kind is sort), "") for sort in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    )
    if not others and not {"model", "args", "processing_class"} <= {one.name for one in own}:
        raise ValueError(
            f"Several training runs need several trainers, but the constructor of {kind.__name__} takes no `model`, `args` and "
            "`processing_class` to make another one from. Add them, or `**kwargs`, and hand them on to Trainer's."
        )
    bound = dict(Signature(own).bind(None, *given, **named).arguments)
    del bound[own[0].name]  # self
    # What `*args` holds has the names of the next class's constructor.
    names = next(found for found in signatures if all(one.kind is not Parameter.VAR_POSITIONAL for one in found))
    positional = zip([one.name for one in names[1:]], bound.pop(rest, ()), strict=False)
    return {**bound.pop(others, {}), **bound, **dict(positional)}


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
