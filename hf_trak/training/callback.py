"""`AttributionCallback`: snapshots of one training run, for attribution; and how a snapshot is written."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_trak.members import Members
from hf_trak.training.model_upload import MEMBERS_FOLDER


class AttributionCallback(TrainerCallback):
    """Keeps snapshots of the weights for attribution; works with a stock `Trainer`.

    Snapshots are ordinary `save_pretrained` folders under `<output_dir>/members`. Taking them draws no random number: training is
    the same with and without.

    Args:
        members (`str`): Which to keep: "final", "epoch:K" for those of the last K epochs, or "steps:[S, ...]".

    Raises:
        ValueError: If `members` is none of these.
    """

    def __init__(self, members: str = "final") -> None:
        self.members = Members.parse(members)
        if not self.members.is_single_run:
            raise ValueError(
                f"A callback sees one training run, and members={members!r} takes several; use an AttributionTrainer."
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that what is asked for can be kept, and forget snapshots that this run has not reached."""
        check_can_save(args, kwargs["model"])
        late = [step for step in self.members.steps if step > state.max_steps]
        if late:
            raise ValueError(
                f"`members` asks for the weights after step {late[0]}, but the run ends at step {state.max_steps}."
            )
        if not state.is_world_process_zero:
            return
        reached = {"epoch": _epoch(state), "step": state.global_step}
        for folder in (Path(args.output_dir) / MEMBERS_FOLDER).glob("*"):
            kind, _, number = folder.name.partition("-")
            if folder.name == "final" or (kind in reached and number.isdigit() and int(number) > reached[kind]):
                shutil.rmtree(folder)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights of a step that was asked for."""
        if state.global_step in self.members.steps:
            self._save(args, state, kwargs, f"step-{state.global_step:07d}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights of this epoch, and no more epochs than were asked for."""
        if self.members.kind != "epoch":
            return
        self._save(args, state, kwargs, f"epoch-{_epoch(state):04d}")
        if state.is_world_process_zero:
            for folder in sorted((Path(args.output_dir) / MEMBERS_FOLDER).glob("epoch-*"))[: -self.members.count]:
                shutil.rmtree(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the final weights: the best ones, where the run loads them at its end."""
        if self.members.kind == "final":
            self._save(args, state, kwargs, "final")

    @staticmethod
    def _save(args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any], name: str) -> None:
        if state.is_world_process_zero:
            save_snapshot(Path(args.output_dir) / MEMBERS_FOLDER / name, kwargs["model"], kwargs.get("processing_class"))


def _epoch(state: TrainerState) -> int:
    """Return the number of the epoch that is running or has just ended."""
    return math.ceil((state.epoch or 0) - 1e-6)


def check_can_save(args: TrainingArguments, model: Any) -> None:
    """Refuse what a snapshot could not be taken of, or could not be loaded from, before anything is trained.

    Raises:
        ValueError: If the weights are spread over processes, or an adapter's base model has no place of its own.
    """
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "Snapshots need the whole weights in each process, which FSDP and DeepSpeed do not keep. Train without."
        )
    if _is_adapter(model) and not any(config.base_model_name_or_path for config in model.peft_config.values()):
        raise ValueError(
            "This adapter's base model was made in memory, so snapshots of the adapter could not be loaded again. Save the base "
            "model with `save_pretrained`, and load it from there before adding the adapter."
        )


def _is_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_snapshot(folder: Path, model: Any, processing_class: Any = None) -> None:
    """Save the weights, and what turns rows into inputs beside them; the folder appears under its name when it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    if _is_adapter(model):  # an adapter does not say what class it was added to
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(temporary)
    if processing_class is not None:
        processing_class.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
