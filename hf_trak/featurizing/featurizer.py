"""`Featurizer`: rows of a dataset to trak_* columns; the callable for `Dataset.map`, and what every other path calls."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess
import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.featurizing.batching import (
    Budget,
    Collated,
    automatic_budget,
    check_finite,
    collate_rows,
    count_rows,
    fetch,
    not_finite,
    part_of,
    read_rows,
    to_device,
)
from hf_trak.featurizing.checkpoint_model import CheckpointModel, as_arrays, as_tensors
from hf_trak.featurizing.engine import Gradients
from hf_trak.featurizing.engine_choice import EngineChoice, check_first_rows, rows_to_check
from hf_trak.gradients import (
    BatchFeatures,
    ParameterSelection,
    dropout_mask,
    evaluation_mode,
    select_parameters,
)
from hf_trak.members import PathPoint
from hf_trak.messages import MissingProcessor, is_raised_by_us
from hf_trak.projectors import FastJL, Identity, Projector, StackedProjector, make_projectors
from hf_trak.sources.path_points import measure_statistics, statistics_rows
from hf_trak.sources.processors import check_vocabulary, describe_absence, find_processing_class, hash_processing_class, is_name
from hf_trak.sources.weights import check_dtype
from hf_trak.storage.passes import encode_pass
from hf_trak.tasks import (
    AutoTask,
    Bank,
    Task,
    TaskMaker,
    bank_of,
    draw_rows,
    embed_bank,
    make_task,
    needs_bank,
    with_bank,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_BANK_ROWS = 32  # embedded at a time


class Featurizer:
    """Turns rows into features of one checkpoint under one sketch, or several at the price of one pass of gradients.

    ```python
    >>> featurizer = Featurizer(model, TrakConfig(proj_dim=64), tokenizer)
    >>> columns = train.map(featurizer, batched=True, batch_size=32)
    >>> columns.column_names
    ['text', 'label', 'trak_features', 'trak_out_to_loss', 'trak_output', 'trak_grad_norm']
    >>> featurizer.engine.name
    'layerwise'
    ```

    What it pickles to, and so what `Dataset.map` caches by, is its configuration and the content of the weights: a second run
    finds the cache, and a changed weight does not.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): A model, or a folder or repository to load one from when it is first needed.
        config (`TrakConfig`, *optional*): What features mean.
        processing_class (*optional*): Tokenizer or image processor, or the folder or repository of one; by default the one saved with
            the weights. Rows that are tokenized or pixels already need none.
        task (`Task` or a function, *optional*): In place of the one `config` names; or `(model, config) -> Task`.
        seed (`int` or a sequence, *optional*): The member's sketch seed; by default the configuration's. With several, every
            column comes once per seed, its name ending in `_seed_<seed>`.
        dropout_seed (`int`, *optional*): Of the units removed from the network, the same for every row; by default none are.
        revision (`str`, *optional*): Of the repository in `model`: a branch, tag or commit.
        base (`str` or `Path`, *optional*): The checkpoint that training began from. Features are then of the point base + alpha (final −
            base), made in memory; see [`AttributionIndex.build`]. With BatchNorm, call [`~Featurizer.measure_statistics`] first.
        alpha (`float`, *optional*): Which point; 0.5 by default.
        base_revision (`str`, *optional*): Of the repository in `base`.
        trust_remote_code (`bool`): Run code that the repository in `model` brings along. Without it, such a model is refused.
        device (*optional*): By default, CUDA where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        *,
        task: Task | TaskMaker | None = None,
        seed: int | Sequence[int] | None = None,
        dropout_seed: int | None = None,
        revision: str | None = None,
        base: str | Path | None = None,
        alpha: float | None = None,
        base_revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.config = config or TrakConfig()
        seed = self.config.sketch_seed if seed is None else seed
        self.seeds = (seed,) if isinstance(seed, int) else tuple(seed)
        self.dropout_seed = dropout_seed
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.checkpoint = CheckpointModel(
            model, revision=revision, base=base, alpha=alpha, base_revision=base_revision, trust_remote_code=trust_remote_code
        )
        self._given = (processing_class, task)
        self._ready: tuple[Task, ParameterSelection, Projector, Any] | None = None
        self._unusable: ValueError | None = None  # what is wrong with the checkpoint's own tokenizer or processor
        self._gradients = Gradients()
        self._has_said: set[str] = set()
        self._collating = threading.Lock()  # a tokenizer serves one thread at a time
        self._bank: Bank | None = None  # until there is a task to hold it

    @property
    def model(self) -> PreTrainedModel:
        return self.checkpoint.model

    @property
    def source(self) -> str | None:
        """The folder or repository that the model is loaded from; None of a model in memory."""
        return self.checkpoint.source

    @property
    def point(self) -> PathPoint | None:
        """Which point of the path to the checkpoint the features are of; None for the checkpoint itself."""
        return self.checkpoint.point

    def prepare(self) -> tuple[Task, ParameterSelection, Projector, Any]:
        """Load what is needed, once: task, selected parameters, projector, and tokenizer or image processor.

        Raises:
            ValueError: If no task serves the model, a parameter pattern matches nothing, `proj_dim` exceeds the gradient, or the
                projector does not run on the device.
        """
        if self._ready is None:
            processing_class, task = self._given
            task = AutoTask.from_model(self.model, self.config) if task is None else make_task(task, self.model, self.config)
            processing_class = self._find_processing_class(processing_class)
            check_dtype(self.model, self.config.compute_dtype)
            selection = select_parameters(self.model, self.config.parameters)
            if self.config.proj_dim > selection.grad_dim:
                raise ValueError(
                    f"proj_dim={self.config.proj_dim:,} is more than the {selection.grad_dim:,} selected parameters: a sketch "
                    "cannot be longer than what it sketches. Choose a smaller proj_dim, or projector='identity' with "
                    f"proj_dim={selection.grad_dim}."
                )
            projector = make_projectors(
                self.config.projector, proj_dim=self.config.proj_dim, seeds=self.seeds, fold=self.config.fold
            )
            if isinstance(projector, Identity):
                projector.lay_out({name: parameter.numel() for name, parameter in selection.parameters.items()})
            if isinstance(first := _first_of(projector), FastJL):
                first.tied_to(self.device)
            self.model.to(self.device)
            task = task.with_columns(
                text_columns=self.config.text_columns,
                image_column=self.config.image_column,
                label_column=self.config.label_column,
            )
            if self._bank is not None:
                task = with_bank(task, self._bank.to(self.device))
            self._ready = task, selection, projector, processing_class
        return self._ready

    def _find_processing_class(self, given: Any) -> Any:
        """Return the tokenizer or image processor; None where the checkpoint's own is missing or damaged, which only raw rows need."""
        try:
            found = find_processing_class(
                given, self.source, self.checkpoint.commit, trust_remote_code=self.checkpoint.trust_remote_code
            )
            check_vocabulary(found, self.model)
        except ValueError as error:
            if given is not None:
                raise
            self._unusable = error
            return None
        return found

    @property
    def seed(self) -> int:
        """The sketch seed, or the first of several."""
        return self.seeds[0]

    @property
    def task(self) -> Task:
        return self.prepare()[0]

    @property
    def selection(self) -> ParameterSelection:
        return self.prepare()[1]

    @property
    def processing_class(self) -> Any:
        return self.prepare()[3]

    def check(self, dataset: Dataset) -> None:
        """Decide which columns are read, as [`~Featurizer.read_from`] does, and check that every row can be read.

        Raises:
            ValueError: If the task cannot read the columns or some rows, or raw rows need a tokenizer or image processor and there is none.
        """
        try:
            self.read_from(dataset)
            task, _, _, processing_class = self.prepare()
            task.check(dataset, processing_class)
        except MissingProcessor as error:
            raise self._absence(str(error)) from error

    def check_first_rows(self, dataset: Dataset) -> None:
        """Check a language model on first rows: packed documents are kept apart, and its own loss is the one assumed, or that is told.

        Raises:
            ValueError: If a document sees another one.
        """
        if (line := check_first_rows(self, dataset)) is not None:
            self.say(line)

    def _absence(self, reason: str) -> ValueError:
        """Return the error for raw rows that nothing can read, naming the checkpoint, or what is wrong with its files."""
        return self._unusable or MissingProcessor(describe_absence(self.source, self._given[0], reason))

    @property
    def processor(self) -> str | None:
        """The folder or repository that was given as `processing_class`; None for an object, and where nothing was given."""
        return str(self._given[0]) if is_name(self._given[0]) else None

    @property
    def gpu_model(self) -> str | None:
        """The model of GPU that features are tied to; None where they mean the same on every machine."""
        projector = _first_of(self.prepare()[2])
        return projector.tied_to(self.device) if isinstance(projector, FastJL) else None

    @property
    def bank(self) -> Bank | None:
        """What a contrastive task holds examples against, once [`~Featurizer.make_bank`] has made it."""
        return bank_of(self.task)

    def make_bank(self, dataset: Dataset) -> Bank | None:
        """Embed the pairs of a training set that examples are held against, and hold them against these; None for other tasks.

        Which pairs those are depends on `bank_seed`, `bank_size` and the number of rows alone, their embeddings on the checkpoint.

        Raises:
            ValueError: If the training set is smaller than the bank.
        """
        task, _, _, processing_class = self.prepare()
        if not needs_bank(task):
            return None
        rows = draw_rows(len(dataset), self.config.bank_size, self.config.bank_seed)
        chunks = [chunk.tolist() for chunk in rows.split(_BANK_ROWS)]
        parts = []
        for chunk in chunks:
            batch = to_device(task.collate(read_rows(dataset, chunk), processing_class), self.device)
            with dropout_mask(self.model, self.dropout_seed), evaluation_mode(self.model), self._autocast():
                parts.append(embed_bank(task, self.model, batch, torch.tensor(chunk)))
        bank = Bank.join(parts)
        self.use_bank(bank)
        return bank

    def use_bank(self, bank: Bank) -> None:
        """Hold examples against a bank that was made before."""
        task, *others = self.prepare()
        self._ready = (with_bank(task, bank.to(self.device)), *others)

    def measure_statistics(self, dataset: Dataset) -> dict[str, Tensor] | None:
        """Measure the running statistics of BatchNorm at the point of a path, on rows of the training set; None where there are none to measure.

        Which rows those are depends on their number alone.

        Raises:
            ValueError: If there are too few rows, or a statistic is not finite.
        """
        task, _, _, processing_class = self.prepare()
        names = self.checkpoint.measured
        if not names:
            return None

        def forward(rows: list[int]) -> None:
            batch = to_device(task.collate(read_rows(dataset, rows), processing_class), self.device)
            if needs_bank(task):
                embed_bank(task, self.model, batch, torch.tensor(rows))
            else:
                task.output_function(self.model, batch)

        with dropout_mask(self.model, self.dropout_seed), evaluation_mode(self.model), self._autocast():
            self.checkpoint.use_statistics(measure_statistics(self.model, names, statistics_rows(len(dataset)), forward))
        return self.checkpoint.statistics

    def use_task(self, task: Task) -> None:
        """Go on with another task of the same inputs."""
        self._ready = (task, *self.prepare()[1:])

    def read_from(self, dataset: Dataset) -> None:
        """Decide, once for all batches, which columns of a dataset are read, and hold its label names against the model's.

        Columns that the configuration names, or that were decided on before, stay; the others become part of the configuration.

        Raises:
            ValueError: If no column can serve, several may be meant, or the label names contradict the model's.
        """
        task = self.task.reading(dataset)
        self.use_task(task)
        self.config = replace(self.config, **task.columns())

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16")

    @property
    def budget(self) -> Budget:
        """What a batch of `batch_size="auto"` holds."""
        return automatic_budget(self.device.type, functional=self.config.gradients == "functional")

    def lengths(self, dataset: Dataset) -> list[int] | None:
        """Return the number of tokens of each row; None where all rows are alike."""
        task, _, _, processing_class = self.prepare()
        return task.inputs.lengths(dataset, processing_class)

    def collate(self, rows: Mapping[str, Sequence[Any]]) -> Collated:
        """Return a batch of rows, where the device can fetch it without being waited for. It remembers its rows."""
        return Collated(self._collate(rows), rows, self._collate)

    def _collate(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        task, _, _, processing_class = self.prepare()
        try:
            with self._collating:
                batch = task.collate(rows, processing_class)
        except (TypeError, AttributeError) as error:
            if processing_class is not None or {"input_ids", "pixel_values"} & set(rows):
                raise
            raise self._absence("These rows are neither tokenized nor pixels") from error
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # the thread that reads would open a context on the first device
            return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}

    @property
    def engine(self) -> EngineChoice | None:
        """Which engine makes the gradients, and why; None until it is decided, by [`~Featurizer.choose_engine`] or the first batch."""
        return self._gradients.engine

    def choose_engine(self, dataset: Dataset) -> EngineChoice:
        """Decide which engine makes the gradients, from the model and some rows of the data set they will be of.

        Raises:
            ValueError: If `config.gradients` names an engine that is not right for the model.
        """
        numbers = rows_to_check(dataset, self.lengths)
        self._gradients.decide(self, collate_rows(self.collate, dataset, numbers), list(range(len(numbers))))
        return self.engine or EngineChoice("loop", reason="there is one row, which cannot be checked beside others")

    def use_engine(self, engine: EngineChoice) -> None:
        """Go on with the engine that others of a run have decided on."""
        self._gradients.use(engine)

    @contextmanager
    def naming_columns(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Say what a batch holds where the model's code fails at it.

        Raises:
            ValueError: In place of the library's error, but for memory that runs out.
        """
        try:
            yield
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:
            own_task = self._given[1] is not None  # whose code may be what fails
            if own_task or should_reduce_batch_size(error) or is_raised_by_us(error):
                raise
            shapes = [f"{name} {tuple(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor)]
            raise ValueError(
                f"{type(self.model).__name__} cannot compute a batch of {', '.join(shapes)}: {str(error).rstrip('.')} ({type(error).__name__}). "
                "Check that these columns are prepared as those that the model was trained on."
            ) from error

    def say(self, message: str) -> None:
        """Tell something once."""
        if message not in self._has_said:
            self._has_said.add(message)
            logger.warning(message)

    def features(self, batch: Mapping[str, Any], *, projector: Projector | None = None) -> BatchFeatures:
        """Return the features of a batch that the task's collator made, on the device; those of several sketches side by side.

        Args:
            projector ([`Projector`], *optional*): In place of the featurizer's own.
        """
        self.checkpoint.check_statistics()
        with dropout_mask(self.model, self.dropout_seed):
            return self._gradients.of(self, batch, projector or self.prepare()[2])

    def outputs(self, batch: Mapping[str, Any]) -> BatchFeatures:
        """Return the outputs of a batch by a forward pass alone, on the CPU; the features have no columns."""
        found = self._forward(batch, self.task.output_function)
        output, out_to_loss = (torch.cat(values).float().cpu() for values in zip(*found, strict=True))
        return BatchFeatures(features=output.new_empty(len(output), 0), output=output, out_to_loss=out_to_loss)

    def predictions(self, batch: Mapping[str, Any]) -> BatchFeatures:
        """Return what the model says of a batch, as [`Task.predict`] does, in place of features."""
        found = torch.cat(self._forward(batch, self.task.predict)).float().cpu()
        nothing = found.new_zeros(len(found))
        return BatchFeatures(features=found.view(len(found), -1), output=nothing, out_to_loss=nothing)

    def _forward(self, batch: Mapping[str, Any], function: Callable[[Any, Mapping[str, Any]], Any]) -> list[Any]:
        """Return what a function of the model and a batch returns; rows go one by one where the engine is the loop, since there they are
        not independent of each other or of padding."""
        self.checkpoint.check_statistics()
        n_rows = count_rows(batch)
        alone = n_rows > 1 and self._gradients.is_loop
        parts = [part_of(batch, [number]) for number in range(n_rows)] if alone else [batch]
        with self.inference() as model:
            return [function(model, to_device(part, self.device)) for part in parts]

    @contextmanager
    def inference(self) -> Iterator[PreTrainedModel]:
        """Give the model as features are taken of it, without gradients."""
        with dropout_mask(self.model, self.dropout_seed), evaluation_mode(self.model), self._autocast(), torch.no_grad():
            yield self.model

    def compute(self, batch: Mapping[str, Tensor], ids: Sequence[int] | None = None) -> BatchFeatures:
        """Return the features of a batch, on the CPU.

        ```python
        >>> featurizer = Featurizer(model, TrakConfig(proj_dim=64), tokenizer)
        >>> featurizer.check(train)
        >>> features = featurizer.compute(featurizer.collate(train[:4]))
        >>> features.features.shape, features.output.shape
        (torch.Size([4, 64]), torch.Size([4]))
        ```

        Args:
            ids (`Sequence[int]`, *optional*): The rows' ids, for error messages.

        Raises:
            ValueError: If a row's output or gradient is not finite; the message names the rows. Or if the model cannot compute the batch.
        """
        with self.naming_columns(batch):
            features = fetch(self.features(batch))
        bad = not_finite(features)
        if bad and not self._gradients.is_loop:
            # Padding may have done it, as in models that take the logarithm of what a mask hides.
            with dropout_mask(self.model, self.dropout_seed):
                again = fetch(self._gradients.by_loop(self, batch, self.prepare()[2], bad))
            for values, new in zip(features, again, strict=True):
                values[bad] = new
        if bad:
            check_finite(features, ids)
        return features

    def encode(self, features: BatchFeatures) -> dict[str, np.ndarray]:
        """Return the trak_* columns, as they are stored."""
        return encode_pass(
            features.features, features.output, features.out_to_loss, seeds=self.seeds, dtype=self.config.features_dtype
        )

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return the trak_* columns of some rows.

        Args:
            rows (`dict`): Columns, as `Dataset.map(batched=True)` passes them.
            indices (`Sequence[int]`, *optional*): The rows' ids, for error messages.

        Raises:
            ValueError: If a row's output or gradient is not finite; the message names the rows.
        """
        return self.encode(self.compute(self.collate(rows), indices))

    def __getstate__(self) -> dict[str, Any]:
        processing_class, task = self._given
        bank = bank_of(self._ready[0]) if self._ready is not None else self._bank
        return {
            "config": self.config.to_dict(),
            "seed": list(self.seeds),
            "dropout_seed": self.dropout_seed,
            "source": self.source,
            "revision": self.checkpoint.commit,
            "trust_remote_code": self.checkpoint.trust_remote_code,
            "model_hash": self.checkpoint.hash(),
            **self.checkpoint.point_state(),
            "processing_hash": hash_processing_class(self.processing_class if is_name(processing_class) else processing_class),
            "processor": self.processor,
            "task": _fingerprint(task) if task is not None else None,
            "bank": as_arrays(bank.tensors()) if bank is not None else None,
            "portable": self.source is not None and (processing_class is None or is_name(processing_class)) and task is None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocess.parent_process() is not None:
            # OpenMP's threads do not survive a fork, and the processes share the cores.
            torch.set_num_threads(1)
        portable = state["portable"]
        self.__init__(  # type: ignore[misc]
            state["source"] if portable else None,
            TrakConfig.from_dict(state["config"]),
            state["processor"],
            seed=state["seed"],
            dropout_seed=state["dropout_seed"],
            revision=state["revision"],
            **(state.get("path", {}) if portable else {}),
            trust_remote_code=state["trust_remote_code"],
        )
        self.checkpoint.restore(state)
        if state["bank"] is not None:
            self._bank = Bank.from_tensors(as_tensors(state["bank"]))


def _fingerprint(task: Task | TaskMaker) -> str:
    """Return what `Dataset.map` caches a given task by: the functions it is made of, and not its name.

    Functions that cannot be pickled give a value that never comes again, so that nothing is read from a cache.
    """
    from datasets.fingerprint import Hasher

    try:
        return Hasher.hash(task)
    except Exception:  # dill raises whatever an object's own pickling raises
        return uuid.uuid4().hex


def _first_of(projector: Projector) -> Projector:
    """The projector itself, or the first of a stack, whose others are of its kind."""
    return projector.projectors[0] if isinstance(projector, StackedProjector) else projector
