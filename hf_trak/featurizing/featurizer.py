"""`Featurizer`: rows of a dataset to trak_* columns; the callable for `Dataset.map`, and what every other path calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess
import numpy as np
import torch
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.featurizing.autocast import in_bfloat16
from hf_trak.featurizing.batching import Budget, automatic_budget, read_rows
from hf_trak.featurizing.fetching import check_finite, fetch
from hf_trak.gradients import (
    GRADIENTS,
    BatchFeatures,
    ParameterSelection,
    check_gradients,
    evaluation_mode,
    select_parameters,
    thinned,
)
from hf_trak.hashing import hash_tensors
from hf_trak.projectors import FastJL, Identity, Projector, StackedProjector, make_projectors
from hf_trak.sources.checkpoints import load_model, load_processing_class
from hf_trak.sources.processing import hash_processing_class
from hf_trak.sources.revisions import pinned_revision
from hf_trak.storage.passes import encode_pass
from hf_trak.tasks import AutoTask, Bank, Task, bank_of, draw_rows, embed_bank, needs_bank, vmappable_attention, with_bank
from hf_trak.tasks.packing import check_documents

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_CHECKED_ROWS = 2
_BANK_ROWS = 32  # embedded at a time


class Featurizer:
    """Turns rows into features of one checkpoint under one sketch, or several at the price of one pass of gradients.

    ```python
    columns = train.map(Featurizer(model, config, tokenizer), batched=True, batch_size=32)
    ```

    What it pickles to, and so what `Dataset.map` caches by, is its configuration and the content of the weights: a second run
    finds the cache, and a changed weight does not.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): A model, or a folder or repository to load one from when it is first needed.
        config (`TrakConfig`, *optional*): What features mean.
        processing_class (*optional*): Tokenizer or image processor; by default the one saved beside the weights, if any.
        task (`Task`, *optional*): In place of the one `config` names.
        seed (`int` or a sequence, *optional*): The member's sketch seed; by default the configuration's. With several, every
            column comes once per seed, its name ending in `_seed_<seed>`.
        dropout_seed (`int`, *optional*): Of the units removed from the network, the same for every row; by default none are.
        revision (`str`, *optional*): Of the repository in `model`: a branch, tag or commit.
        trust_remote_code (`bool`): Run code that the repository in `model` brings along. Without it, such a model is refused.
        device (*optional*): By default, CUDA where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        *,
        task: Task | None = None,
        seed: int | Sequence[int] | None = None,
        dropout_seed: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.config = config or TrakConfig()
        seed = self.config.seed if seed is None else seed
        self.seeds = (seed,) if isinstance(seed, int) else tuple(seed)
        self.dropout_seed = dropout_seed
        self.source = str(model) if isinstance(model, (str, Path)) else None
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self._commit: str | None = None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = None if isinstance(model, (str, Path)) else model
        self._given = (processing_class, task)
        self._ready: tuple[Task, ParameterSelection, Projector, Any] | None = None
        self._hash: str | None = None
        self._checked = False
        self._bank: Bank | None = None  # until there is a task to hold it

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            if self.source is None:
                raise ValueError(
                    "This Featurizer was made from a model in memory and has been sent to another process, where the model is "
                    "not. Save the model and make the Featurizer from the folder, or use num_proc=None."
                )
            self._model = load_model(self.source, self.commit, trust_remote_code=self.trust_remote_code)
        return self._model

    @property
    def commit(self) -> str | None:
        """The commit that everything of a repository is loaded at, whatever happens to it meanwhile; None for a folder."""
        if self._commit is None:
            self._commit = pinned_revision(self.source, self.revision)
        return self._commit

    def prepare(self) -> tuple[Task, ParameterSelection, Projector, Any]:
        """Load what is needed, once: task, selected parameters, projector, and tokenizer or image processor.

        Raises:
            ValueError: If no task serves the model, a parameter pattern matches nothing, `proj_dim` exceeds the gradient, or the
                projector does not run on the device.
        """
        if self._ready is None:
            processing_class, task = self._given
            if task is None:
                task = AutoTask.from_model(self.model, self.config)
            if processing_class is None and self.source is not None:
                processing_class = load_processing_class(self.source, self.commit, trust_remote_code=self.trust_remote_code)
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
            batch = self._on_device(task.collate(read_rows(dataset, chunk), processing_class))
            with thinned(self.model, self.dropout_seed), evaluation_mode(self.model), self._autocast():
                parts.append(embed_bank(task, self.model, batch, torch.tensor(chunk)))
        bank = Bank.join(parts)
        self.use_bank(bank)
        return bank

    def use_bank(self, bank: Bank) -> None:
        """Hold examples against a bank that was made before."""
        task, *others = self.prepare()
        self._ready = (with_bank(task, bank.to(self.device)), *others)

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

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def model_hash(self) -> str:
        """Return the SHA-256 of the model's weights and buffers."""
        if self._hash is None:
            self._hash = hash_tensors(self.model.state_dict())
        return self._hash

    @property
    def budget(self) -> Budget:
        """What a batch of `batch_size="auto"` holds."""
        return automatic_budget(self.device.type, functional=self.config.gradients == "functional")

    def lengths(self, dataset: Dataset) -> list[int] | None:
        """Return the number of tokens of each row; None where all rows are alike."""
        task, _, _, processing_class = self.prepare()
        return task.inputs.lengths(dataset, processing_class)

    def collate(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """Return a batch of rows, where the device can fetch it without being waited for."""
        task, _, _, processing_class = self.prepare()
        batch = task.collate(rows, processing_class)
        if self.device.type != "cuda":
            return batch
        with torch.cuda.device(self.device):  # the thread that reads would open a context on the first device
            return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}

    def features(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        """Return the features of a batch that the task's collator made, on the device; those of several sketches side by side."""
        with thinned(self.model, self.dropout_seed):
            return self._features(batch)

    def _features(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        task, selection, projector, _ = self.prepare()
        batch = self._on_device(batch)
        arguments: dict[str, Any] = {"parameters": selection.parameters, "projector": projector}
        functional = self.config.gradients == "functional"
        output_function = task.output_function
        if self.config.compute_dtype == "bfloat16":
            output_function = in_bfloat16(output_function, device_type=self.device.type, vmapped=functional)
        engine = GRADIENTS[self.config.gradients]
        if functional:
            with vmappable_attention(self.model):
                return engine(self.model, batch, output_function=output_function, **arguments)
        if not self._checked:
            first = {key: value[:_CHECKED_ROWS] if isinstance(value, Tensor) else value for key, value in batch.items()}
            # Not under autocast, whose round-off would hide what is looked for.
            check_documents(self.model, first)
            check_gradients(self.model, first, output_function=task.output_function, **arguments)
            self._checked = True
        return engine(self.model, batch, output_function=output_function, **arguments)

    def compute(self, batch: Mapping[str, Tensor], ids: Sequence[int] | None = None) -> BatchFeatures:
        """Return the features of a batch, on the CPU.

        Args:
            ids (`Sequence[int]`, *optional*): The rows' ids, for error messages.

        Raises:
            ValueError: If a row's output or gradient is not finite; the message names the rows.
        """
        features = fetch(self.features(batch))
        check_finite(features, ids)
        return features

    def encode(self, features: BatchFeatures) -> dict[str, np.ndarray]:
        """Return the trak_* columns, as they are stored."""
        return encode_pass(features.features, features.output, features.out_to_loss, seeds=self.seeds, dtype=self.config.dtype)

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
            "revision": self.commit,
            "trust_remote_code": self.trust_remote_code,
            "model_hash": self.model_hash(),
            "processing_hash": hash_processing_class(processing_class),
            "task": task.name if task is not None else None,
            "bank": {name: values.cpu().numpy() for name, values in bank.tensors().items()} if bank is not None else None,
            "portable": self.source is not None and processing_class is None and task is None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocess.parent_process() is not None:
            # OpenMP's threads do not survive a fork, and the processes share the cores.
            torch.set_num_threads(1)
        portable = state["portable"]
        self.__init__(  # type: ignore[misc]
            state["source"] if portable else None,
            TrakConfig.from_dict(state["config"]),
            seed=state["seed"],
            dropout_seed=state["dropout_seed"],
            revision=state["revision"],
            trust_remote_code=state["trust_remote_code"],
        )
        self._hash = state["model_hash"]
        if state["bank"] is not None:
            self._bank = Bank.from_tensors({name: torch.from_numpy(values) for name, values in state["bank"].items()})


def _first_of(projector: Projector) -> Projector:
    """The projector itself, or the first of a stack, whose others are of its kind."""
    return projector.projectors[0] if isinstance(projector, StackedProjector) else projector
