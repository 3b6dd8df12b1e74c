"""`AttributionMixin`: what makes a Trainer keep what attribution needs, and then attribute."""

from __future__ import annotations

import copy
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as transformers_logging

from hf_trak.building.checks import check_rows_before_training
from hf_trak.config import TrakConfig
from hf_trak.hub.cards import render_model_section
from hf_trak.index import AttributionIndex
from hf_trak.members import ADAPTER, AUTO, INITIAL, Ensemble
from hf_trak.sources.path_bases import find_base, load_base
from hf_trak.sources.path_points import check_scalable
from hf_trak.sources.row_digests import check_kept
from hf_trak.sources.streams import is_stream, read_stream
from hf_trak.storage.files import TEMPORARY, write_folder
from hf_trak.storage.snapshots import is_snapshot
from hf_trak.tasks import AutoTask, is_language_model
from hf_trak.tasks.chunks import is_chunked
from hf_trak.tasks.preferences import PREFERENCE_TOKENS
from hf_trak.tasks.rewards import REWARD_TOKENS
from hf_trak.tasks.rows import column_names, features_of
from hf_trak.training.callback import INDEX_FOLDER, MEMBERS_FOLDER, AttributionCallback, check_writable, without_indexes
from hf_trak.training.checks import (
    WithoutColumns,
    check_columns,
    check_evaluation_set,
    check_labels,
    check_same_rows,
    check_stream,
    check_training_set,
    choose_queries,
    columns_of_forward,
    describe_unfit_evaluation_set,
    has_scored_token,
    is_transformed,
    list_unknown_losses,
    rows_of_a_run,
    sum_of_logits,
    warning_of_losses,
)
from hf_trak.training.run_identity import describe_run
from hf_trak.training.runs import MoreRuns, RunRecord, constructor_arguments, load_masks, random_state_kept
from hf_trak.training.snapshots import (
    check_can_save,
    check_loaded,
    find_damage,
    is_adapter,
    is_plain,
    last_checkpoint,
    load_copy,
    loads_by_name,
    save_snapshot,
)
from hf_trak.training_args import AttributionArguments, AttributionFields

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import Trainer as _Base

    from hf_trak.tasks import Task

else:
    _Base = object

logger = logging.getLogger(__name__)

_TRIED = ".tried-"
_TAGS = ("trak", "data-attribution")
_SNAPSHOTS = {"final": "final", "epoch": "epoch-*", "steps": "step-*", "path": "step-*", "runs": "run-*", "subsets": "subset-*"}


class AttributionMixin(_Base):
    """What makes a `Trainer` attribute: put it before the class of any Trainer, or call [`attribution`].

    ```python
    >>> class MyTrainer(AttributionMixin, Trainer):
    ...     pass
    ```

    Whatever `members` are, `train()` leaves the ordinary model of the whole training set, trained bit for bit as `Trainer` does.
    The further runs of `members="runs:M"` and `"subsets:M"` follow it, from the same initial weights (or `model_init`), with other
    seeds. New trainers of the same class make them, from the arguments that this one was made from; a trainer that was changed since is
    refused before training. A process that was killed goes on when the same command is run again: finished runs are not repeated, an unfinished one
    resumes from its last checkpoint if `save_strategy` writes any, and starts again otherwise.

    What attribution would refuse is refused before the first step: `train()` checks every row, saves the initial weights, loads them
    again and featurizes two rows. A loss that attribution does not know is told by a warning.

    With `base="initial"` the weights that training begins with are kept, too, and features are of points between them and the members
    (docs/concepts/halfway.md); `base` may also be the folder or repository that the model was loaded from.

    A model that transformers cannot load by its class's name (a plain `nn.Module`, a class of your own) is featurized as copies of the
    trainer's model with the snapshots' weights; see [`~AttributionTrainer.member_models`].

    Args:
        task (`Task`, *optional*): What to attribute, for models no task serves; by default, by the model's architecture.
        attribution_dataset (`Dataset`, *optional*): The rows of `train_dataset` in the same order as attribution shall read them, where
            training reads them otherwise: with random augmentation, or from another class than `datasets.Dataset`.
        model, args, kwargs: As the Trainer has them. `args` that are no [`AttributionArguments`] are taken over with the defaults of an
            attribution; see [`AttributionArguments.from_training_arguments`]. The caller's `args` stay as they are.
    """

    args: Any
    _made_from: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments that further runs make trainers from, whatever constructors of other classes make of them."""
        trainer = super().__new__(cls)
        trainer._made_from = args, kwargs
        return trainer

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        task: Task | None = None,
        attribution_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        args = as_attribution_arguments(args)
        train = kwargs.get("train_dataset")
        if attribution_dataset is not None:
            check_training_set(attribution_dataset, "attribution_dataset")
            check_same_rows(attribution_dataset, train)
        elif is_stream(train):
            check_stream(args)
        elif train is not None:
            check_training_set(train)
        if args.n_rows is not None and (attribution_dataset is not None or not is_stream(train)):
            raise ValueError("`n_rows` says how many rows of a streaming `train_dataset` are attributed to: leave it out.")
        check_evaluation_set(kwargs.get("eval_dataset"))
        write_folder(Path(args.output_dir))
        super().__init__(model=model, args=args, **kwargs)
        self.task = task
        self.attribution_dataset = attribution_dataset
        self._read_from: tuple[Any, Any] = (None, None)
        self._evaluation_documents: Any = None
        self.index: AttributionIndex | None = None
        self.members = args.ensemble().members
        self._check_base()
        self._more_runs = None
        if not self.members.is_single_run:
            given, named = self._made_from
            self._more_runs = MoreRuns(self, self.members, constructor_arguments(type(self), given, named))
        self._described: dict[str, Any] = {}
        self._told_losses: list[str] = []
        if self.members.is_single_run:
            keep_initial = self.args.base == INITIAL
            callback = AttributionCallback(args.members, keep_initial=keep_initial, keep_optimizer=args.keep_optimizer)
            callback._uploads_indexes = callback._tells_losses = False
            self.add_callback(callback)

    def _check_base(self) -> None:
        """Refuse a base that is none of this model's, and settle what "auto" means: an adapter's base model, else the initial weights.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it cannot be.
        """
        args = self.args
        if args.base is None or self.model is None:
            return
        if args.base == AUTO:
            self.args = args = copy.copy(args)
            args.base = ADAPTER if is_adapter(self.model) else INITIAL
            logger.warning("base='auto' is base=%r here.", args.base)
        if args.base == INITIAL and is_adapter(self.model):
            raise ValueError("This model is an adapter, and begins as the model under it: give base='adapter'.")
        if args.base == INITIAL:
            if args.base_revision is not None:
                raise ValueError("`base_revision` is for a base repository, but base='initial'.")
            return
        if args.base == ADAPTER and is_adapter(self.model):
            check_scalable(self.model)
        find_base(self.model, str(args.base), base_revision=args.base_revision)

    def _ensemble(self, masks: Any) -> Ensemble:
        """Return what members are made of: the snapshots that training kept, and which points of which path.

        Raises:
            FileNotFoundError: If snapshots are missing, or the initial weights were not kept.
        """
        ensemble = self.args.ensemble(self.member_models(), masks=masks)
        if ensemble.base != INITIAL:
            return ensemble
        initial = self._members_folder / INITIAL
        if not is_snapshot(initial):
            raise FileNotFoundError(
                f"{initial} is not there: the weights that training began with were not kept. Train with base='initial', or give "
                "the checkpoint that training began from as `base`."
            )
        return replace(ensemble, base=initial)

    @property
    def _attributed(self) -> Any:
        """The rows to attribute to; of a stream, those that are read of it."""
        if self.attribution_dataset is not None or not is_stream(self.train_dataset):
            return self.train_dataset if self.attribution_dataset is None else self.attribution_dataset
        if self._read_from[0] is not self.train_dataset:
            self._read_from = self.train_dataset, self._read_rows_of_stream()
        return self._read_from[1]

    def _read_rows_of_stream(self) -> Dataset:
        """Return the rows of a streaming training set that training reads, or the first `n_rows` of them.

        Raises:
            ValueError: If `n_rows` is more than training reads or the stream has, or several processes or workers share the rows out.
        """
        n_read = rows_of_a_run(self.args)
        if self.args.world_size > 1:
            raise ValueError(
                f"A streaming `train_dataset` is shared out among {self.args.world_size} processes while it is read, so that its rows have no numbers. Train "
                "with one process, or keep the rows: `Dataset.from_generator(lambda: (yield from stream))`."
            )
        if n_read is None or self.args.n_rows is None:
            n_rows = self.args.n_rows or n_read
            return read_stream(self.train_dataset if n_rows is None else self.train_dataset.take(n_rows))
        if self.args.n_rows > n_read:
            raise ValueError(
                f"n_rows={self.args.n_rows}, but training reads {n_read} rows of the stream (max_steps × rows of a step). Leave `n_rows` out to "
                "attribute to those."
            )
        if self.args.n_rows < n_read:
            logger.warning(
                "Training reads up to %d rows of the stream, of which the first %d are attributed to (n_rows).",
                n_read,
                self.args.n_rows,
            )
        return read_stream(self.train_dataset, self.args.n_rows)

    @property
    def _shifts_labels(self) -> bool:
        return not is_plain(self.model) and is_language_model(self.model) and AutoTask.name_for(self.model) == "causal-lm"

    @property
    def _members_folder(self) -> Path:
        return Path(self.args.output_dir) / MEMBERS_FOLDER

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does, and then the further runs that `members` asks for, if any.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As `Trainer` has it. By default, a run of the same settings that was
                killed goes on from its last checkpoint; False starts it again.
        """
        if trial is not None:  # a search for hyper-parameters, whose models are thrown away
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._check_before_training()
        if self._more_runs is not None:
            return self._more_runs.train(resume_from_checkpoint, ignore_keys_for_eval)
        with random_state_kept():
            self._described = describe_run(self, self._described)
        record = RunRecord(self._members_folder, Path(self.args.output_dir), self._described)
        return self._train_once(record, resume_from_checkpoint, ignore_keys_for_eval)

    def _train_once(
        self, record: RunRecord, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        """Run `Trainer.train` under a record, from the recorded run's last checkpoint where there is one to go on from."""
        # The first process looks, and sets aside what is damaged; the others take its word.
        found = [self._find_checkpoint(record, resume_from_checkpoint) if self.is_world_process_zero() else None]
        checkpoint, is_recorded = broadcast_object_list(found, from_process=0)[0]
        if not is_recorded and self.is_world_process_zero():
            record.begin()
        output = super().train(checkpoint, None, ignore_keys_for_eval)
        if self.members.is_single_run and self.is_world_process_zero():
            record.finish(output._asdict())
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss as `Trainer` computes it; 0 for a batch without a scored token, of which the mean would be NaN.

        There are such batches where `skip_unscored` keeps rows without a scored token.
        """
        if not self.args.skip_unscored or has_scored_token(inputs, shifted=self._shifts_labels):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = sum_of_logits(outputs) * 0.0
        return (loss, outputs) if return_outputs else loss

    def _find_checkpoint(self, record: RunRecord, wanted: str | bool | None) -> tuple[str | bool | None, bool]:
        """Return what to go on from, and whether the recorded run goes on.

        Raises:
            ValueError: If the checkpoint that is asked for is damaged.
        """
        if wanted is None:
            last = record.checkpoint()
            return (None, False) if last is None else (str(last), True)
        world_size = self.args.world_size
        if wanted is True and not self.args.save_only_model:
            last = last_checkpoint(record.checkpoints, since_ns=0, world_size=world_size)
            return (True if last is None else str(last)), False
        if (
            isinstance(wanted, str)
            and not self.args.save_only_model
            and (damage := find_damage(Path(wanted), world_size=world_size))
        ):
            raise ValueError(f"`resume_from_checkpoint` is {wanted}, from which training cannot go on: {damage}.")
        return wanted, False

    def _check_before_training(self) -> None:
        """Refuse what could not be attributed to after training, and tell what attribution does not know; draws no random numbers.

        Raises:
            ValueError: With the way out.
            OSError: If snapshots cannot be written.
        """
        check_training_set(self._attributed)
        if self.args.chunk_overlap is not None and not is_chunked(column_names(self._attributed)):
            raise ValueError(
                f"`chunk_overlap` cuts the texts of an AttributionTrainer, but {type(self).__name__} makes the rows that it trains on itself, cut off at "
                "`max_length`. Leave it out, or give `train_dataset` as chunks: docs/guides/documents.md."
            )
        check_same_rows(self._attributed, self.train_dataset)
        check_can_save(self.args, self.model, self.processing_class)
        if self.task is None and is_plain(self.model):
            raise ValueError(
                f"No task serves a {type(self.model).__name__}, which is no model of transformers. Say what to attribute with "
                "`task=Task.custom(...)`: docs/guides/custom_tasks.md."
            )
        task = self.task or AutoTask.from_model(self.model, self._task_config())
        with random_state_kept():  # a transform may draw
            task = task.reading(self._attributed)
            if self.attribution_dataset is None:
                check_columns(self, task, self._attributed)
                check_labels(self, task, self._attributed)
            features: Any = features_of(self._attributed)
            task.inputs.check(features, self.processing_class)
        if self.is_world_process_zero():
            check_writable(self._members_folder)
            check_kept(self._attributed, self.args.kept_columns())
            with random_state_kept(), _without_progress_bars():
                self._check_rows_before_training()
                self._tell_of_queries(task)
        self.accelerator.wait_for_everyone()
        losses = list_unknown_losses(self) if self.task is None else []
        if losses and losses != self._told_losses and self.is_world_process_zero():
            warnings.warn(warning_of_losses(losses, task.name), UserWarning, stacklevel=3)
        self._told_losses = losses

    def _check_rows_before_training(self) -> None:
        """Save the weights, load them as members will be, check all rows and featurize two."""
        for leftover in self._members_folder.glob(f"{_TRIED}*{TEMPORARY}"):  # of a process that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=_TRIED, suffix=TEMPORARY, dir=self._members_folder) as folder:
            snapshot = Path(folder) / "snapshot"
            save_snapshot(snapshot, self.model, self.processing_class)
            featurizer = check_rows_before_training(
                self._member(snapshot),
                self._attributed,
                self._trak_config(),
                processing_class=self.processing_class,
                task=self.task,
                dropout_seed=self.args.sketch_seed if self.args.dropout_seeds else None,
                device=self.args.device,
            )
            check_loaded(featurizer.model, self.model)
            if self.args.base not in (None, INITIAL, ADAPTER):
                load_base(featurizer.model, self.args.base, self.args.base_revision)  # raises for that of another model

    def _tell_of_queries(self, task: Task) -> None:
        """Say why the evaluation set cannot be the queries, if it cannot; others may be given."""
        line = describe_unfit_evaluation_set(self._query_sets)
        if line is not None:
            logger.warning(line)

    @property
    def _query_sets(self) -> Any:
        """The evaluation sets as queries: documents where evaluation has their chunks."""
        return self.eval_dataset if self._evaluation_documents is None else self._evaluation_documents

    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        """Drop columns as `Trainer` does; of rows that a transform makes, after it has read them."""
        if not self.args.remove_unused_columns or not is_transformed(dataset):
            return super()._remove_unused_columns(dataset, description)
        dropped = set(dataset.column_names) - set(columns_of_forward(self))
        if not dropped:
            return dataset
        form = dataset.format
        return dataset.with_transform(
            WithoutColumns(form["format_kwargs"]["transform"], dropped),
            columns=form["columns"],
            output_all_columns=form["output_all_columns"],
        )

    def member_checkpoints(self) -> list[Path]:
        """Return the snapshots that training kept, oldest first.

        Raises:
            FileNotFoundError: If some are missing: `train()` has not run to its end in this `output_dir`.
        """
        found = sorted(filter(is_snapshot, self._members_folder.glob(_SNAPSHOTS[self.members.kind])))
        wanted = 1 if self.members.kind == "epoch" else self.members.count
        if len(found) < wanted:
            raise FileNotFoundError(
                f"{self._members_folder} holds {len(found) or 'no'} snapshots for members={self.args.members!r}; call `train()` "
                "first, with the same `output_dir` and `members`."
            )
        return found if self.members.is_single_run else found[:wanted]

    def member_models(self) -> list[Path | nn.Module]:
        """Return what members are featurized with: the snapshots, or, of a class that does not load by its name, models that hold them.

        The latter take the memory of as many models, and are what `AttributionIndex.from_pretrained(folder, models=...)` needs again.
        """
        return [self._member(snapshot) for snapshot in self.member_checkpoints()]

    def _member(self, snapshot: Path) -> Path | nn.Module:
        return snapshot if loads_by_name(self.model) else load_copy(snapshot, self.model)

    def featurize(
        self, dataset: Dataset | IterableDataset | None = None, *, n_rows: int | None = None, overwrite: bool = False
    ) -> AttributionIndex:
        """Featurize the training set under every member and return the index, which lies in `<output_dir>/index`.

        Stopped at any moment, calling it again goes on where it stopped. Under a launcher, all processes call it and share the work.

        Args:
            dataset (`Dataset` or `IterableDataset`, *optional*): By default, `attribution_dataset` or the training set; of a stream, the rows
                that training read.
            n_rows (`int`, *optional*): Of a stream that is given, how many rows to read; by default, all until it ends.
            overwrite (`bool`): Replace an index of other features.
        """
        given = dataset
        dataset = self._attributed if dataset is None else dataset
        if dataset is None:
            raise ValueError("There is no training set to featurize; give one to the trainer, or as `dataset`.")
        if not is_stream(dataset):
            check_training_set(dataset, "dataset")
        self.accelerator.wait_for_everyone()  # the first process has written the snapshots
        with_masks = self.members.kind == "subsets" and (given is None or given is self._attributed)
        self.index = AttributionIndex.build(
            Path(self.args.output_dir) / INDEX_FOLDER,
            models=self._ensemble(load_masks(self._members_folder)[: self.members.count] if with_masks else None),
            dataset=dataset,
            n_rows=n_rows,
            config=self._trak_config(),
            processing_class=self.processing_class,
            task=self.task,
            batch_size=self.args.rows_at_a_time(),
            shard_rows=self.args.shard_rows,
            keep_columns=self.args.kept_columns(),
            overwrite=overwrite,
            progress=not self.args.disable_tqdm,
        )
        return self.index

    def _task_config(self) -> TrakConfig:
        """The arguments' configuration; of the rows that TRL's DPOTrainer makes, of preferences with its beta, and of RewardTrainer's."""
        config, columns = self.args.trak_config(), set(column_names(self._attributed))
        if "input_ids" not in columns and set(REWARD_TOKENS) <= columns and "prompt_ids" not in columns:
            return replace(config, task="preference")
        if not set(PREFERENCE_TOKENS) <= columns:
            return config
        return replace(config, task="preference", preference_beta=getattr(self.args, "beta", config.preference_beta))

    def _trak_config(self) -> TrakConfig:
        """The arguments' configuration; parameters that were frozen in training, which snapshots do not tell, are named."""
        config = self._task_config()
        parameters = dict(self.model.named_parameters())
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        if config.parameters is None and len(trained) < len(parameters):
            config = replace(config, parameters=tuple(f"^{re.escape(name)}$" for name in trained))
        return config

    def attribute(self, queries: Dataset | str | None = None, top_k: int = 10, **options: Any) -> Dataset:
        """Return each query's strongest proponents and opponents among the training set; see [`AttributionIndex.attribute`].

        Args:
            queries (`Dataset`, `IterableDataset` or `str`, *optional*): By default, the evaluation set; the name of one if there are several.
            options: Of [`AttributionIndex.attribute`].
        """
        queries = choose_queries(queries, self._query_sets)
        index = self.index or self.featurize()
        defaults = {"batch_size": self.args.rows_at_a_time(), "progress": not self.args.disable_tqdm}
        return index.attribute(queries, top_k, **{**defaults, **options})

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model and its members as `Trainer.push_to_hub` does; indexes stay here.

        Features are a dataset, with the licence of the training data: push them with `trainer.index.push_to_hub(...)`.
        """
        with without_indexes():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with without_indexes():
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write the card that `Trainer` writes, with a section on how to ask the model for its training examples."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        super().create_model_card(*args, tags=[*given, *(tag for tag in _TAGS if tag not in given)], **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            card.write_text(card.read_text() + render_model_section(self.args.members), encoding="utf-8")


def as_attribution_arguments(args: TrainingArguments | None) -> Any:
    """Return a copy of the arguments with the fields of an attribution.

    Raises:
        ValueError: If they are no `TrainingArguments`.
    """
    if args is None:
        return AttributionArguments()
    if not isinstance(args, TrainingArguments):
        raise ValueError(f"`args` must be AttributionArguments or other TrainingArguments, but is {type(args).__name__}.")
    return copy.copy(args) if isinstance(args, AttributionFields) else AttributionArguments.from_training_arguments(args)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hush transformers' bars of files that are saved and loaded."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
