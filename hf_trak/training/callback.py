"""`AttributionCallback`: snapshots of one training run; and uploads that leave the indexes of a run out."""

from __future__ import annotations

import glob
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_trak.config import CONFIG_NAME
from hf_trak.members import INITIAL, Members
from hf_trak.storage.files import TEMPORARY, write_folder, write_json
from hf_trak.storage.snapshots import is_snapshot, refuse_other
from hf_trak.training.checks import list_unknown_losses_of_run, warning_of_losses
from hf_trak.training.snapshots import check_can_save, check_room, discard_snapshot, save_snapshot

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


_PROBE = ".probe.json"


class AttributionCallback(TrainerCallback):
    """Keeps snapshots of the weights for attribution; works with a stock `Trainer`.

    Snapshots are ordinary `save_pretrained` folders under `<output_dir>/members`; of a module that is no model of transformers, its
    `state_dict`. Taking them draws no random number: training is the same with and without. What cannot be kept is refused before the
    first step. Only snapshots are ever replaced or deleted. Label smoothing, NEFTune and a loss of the model's own that attribution does
    not know are told by a warning; a callback cannot see `compute_loss_func` or an overridden `compute_loss`.

    ```python
    >>> batches = tokenizer(train["text"][:], padding=True)
    >>> rows = Dataset.from_dict({**batches, "labels": train["label"]})
    >>> args = TrainingArguments("of-a-stock-trainer", max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
    >>> trainer = Trainer(copy.deepcopy(model), args, train_dataset=rows, callbacks=[AttributionCallback()])
    >>> output = trainer.train()
    {'train_runtime': ...}
    >>> os.listdir("of-a-stock-trainer/members")
    ['final']
    ```

    Args:
        members (`str`): Which to keep: "final", "epoch:K" for those of the last K epochs, "steps:[S, ...]", or "path:K" for those after 1/4,
            1/8, ... of the steps.
        keep_initial (`bool`): Keep the weights that the run begins with, too, as `<output_dir>/members/initial`: a base for points of
            the path from them. A run that goes on from a checkpoint needs those that it began with.
        keep_optimizer (`bool`): Keep the optimizer's state with each snapshot, and what was logged, for
            [`AttributionIndex.select`] with `method="less"`. Of Adam, it is twice as large as the trained weights.

    Raises:
        ValueError: If `members` is none of these.
    """

    # An AttributionTrainer leaves indexes out of uploads, and tells losses itself: those too that a callback does not see.
    _uploads_indexes = True
    _tells_losses = True

    def __init__(self, members: str = "final", *, keep_initial: bool = False, keep_optimizer: bool = False) -> None:
        self.members = Members.parse(members)
        self.keep_initial = keep_initial
        self.keep_optimizer = keep_optimizer
        self._steps: tuple[int, ...] = ()  # until a run says how many it has
        if not self.members.is_single_run:
            raise ValueError(
                f"A callback sees one training run, and members={members!r} takes several; use an AttributionTrainer."
            )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that what is asked for can be kept, and forget snapshots that this run has not reached."""
        model = kwargs["model"]
        check_can_save(args, model, kwargs.get("processing_class"))
        self._steps = self.members.steps_of(state.max_steps)
        if self.keep_optimizer and self.members.kind == "final" and args.load_best_model_at_end:
            raise ValueError(
                "The best weights are loaded at the end of this run, whose optimizer's state is of later ones, so that `keep_optimizer` would "
                "keep what does not belong together. Keep those of epochs (members='epoch:K'), or set load_best_model_at_end=False."
            )
        _check_rows(kwargs.get("train_dataloader"))
        folder = Path(args.output_dir) / MEMBERS_FOLDER
        if self.keep_initial and state.global_step > 0 and not is_snapshot(folder / INITIAL):
            raise ValueError(
                f"This run goes on from a checkpoint, and the weights that it began with were not kept in {folder / INITIAL}. Start it "
                "again with resume_from_checkpoint=False, or give the checkpoint that it began from as `base`."
            )
        losses = list_unknown_losses_of_run(args, model) if self._tells_losses and state.is_world_process_zero else []
        if losses:
            warnings.warn(warning_of_losses(losses), UserWarning, stacklevel=2)
        if args.push_to_hub:
            self._check_upload(args)
        if not state.is_world_process_zero:
            return
        check_writable(folder)
        reached = {"epoch": _epoch(state), "step": state.global_step}
        for snapshot in folder.glob("*"):
            kind, _, number = snapshot.name.partition("-")
            ours = snapshot.name == "final" or (kind in reached and number.isdigit())
            if ours and kind == ("step" if self._steps else self.members.kind):
                refuse_other(snapshot)
            if ours and (snapshot.name == "final" or int(number) > reached[kind]):
                discard_snapshot(snapshot)
        # A new snapshot is whole before the oldest is deleted.
        begins = self.keep_initial and state.global_step == 0
        check_room(
            folder, model, (self.members.count + (self.members.kind == "epoch")) * (3 if self.keep_optimizer else 1) + begins
        )
        if begins:
            refuse_other(folder / INITIAL)
            self._save(args, state, kwargs, INITIAL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights of a step that was asked for."""
        if state.global_step in self._steps:
            self._save(args, state, kwargs, f"step-{state.global_step:07d}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the weights of this epoch, and no more epochs than were asked for."""
        if self.members.kind != "epoch":
            return
        self._save(args, state, kwargs, f"epoch-{_epoch(state):04d}")
        if state.is_world_process_zero:
            found = sorted(filter(is_snapshot, (Path(args.output_dir) / MEMBERS_FOLDER).glob("epoch-*")))
            for folder in found[: -self.members.count]:
                discard_snapshot(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the final weights: the best ones, where the run loads them at its end."""
        if self.members.kind == "final":
            self._save(args, state, kwargs, "final")

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse an upload that would take features along."""
        self._check_upload(args)

    def _check_upload(self, args: TrainingArguments) -> None:
        found = find_indexes(Path(args.output_dir)) if self._uploads_indexes else []
        if found:
            raise ValueError(
                f"{args.output_dir} holds an index, {found[0]}, and `Trainer` would upload its features with the model. Move it out of "
                "`output_dir`, or use an AttributionTrainer, which leaves indexes out; push the index with `index.push_to_hub`."
            )

    def _save(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any], name: str) -> None:
        def save_optimizer(folder: Path) -> None:
            torch.save(kwargs["optimizer"].state_dict(), folder / "optimizer.pt")
            state.save_to_json(str(folder / "trainer_state.json"))

        if state.is_world_process_zero:
            also = save_optimizer if self.keep_optimizer and name != INITIAL else lambda folder: None
            folder = Path(args.output_dir) / MEMBERS_FOLDER / name
            save_snapshot(folder, kwargs["model"], kwargs.get("processing_class"), also)


def _epoch(state: TrainerState) -> int:
    """Return the number of the epoch that is running or has just ended."""
    return math.ceil((state.epoch or 0) - 1e-6)


def _check_rows(dataloader: Any) -> None:
    dataset: Any = getattr(dataloader, "dataset", None)
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("The training set is empty: there is nothing to train on or to attribute to.")


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which is made if need be.

    Raises:
        OSError: With advice.
    """
    write_folder(folder)
    write_json(folder / _PROBE, {})
    (folder / _PROBE).unlink()
