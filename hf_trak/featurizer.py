"""`Featurizer`: rows of a dataset to trak_* columns; the callable for `Dataset.map`, and what every other path calls."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess
import numpy as np
import torch
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.gradients import (
    GRADIENTS,
    BatchFeatures,
    ParameterSelection,
    check_gradients,
    select_parameters,
)
from hf_trak.hashing import hash_file, hash_json, hash_tensors
from hf_trak.projectors import Identity, Projector, make_projector
from hf_trak.store import encode_columns
from hf_trak.tasks import AutoTask, Task, vmappable_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED_ROWS = 2


class Featurizer:
    """Turns rows into features of one checkpoint under one sketch.

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
        seed (`int`, *optional*): The member's sketch seed; by default the configuration's.
        device (*optional*): By default, CUDA where there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        *,
        task: Task | None = None,
        seed: int | None = None,
        revision: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.config = config or TrakConfig()
        self.seed = self.config.seed if seed is None else seed
        self.source = str(model) if isinstance(model, (str, Path)) else None
        self.revision = revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = None if isinstance(model, (str, Path)) else model
        self._given = (processing_class, task)
        self._ready: tuple[Task, ParameterSelection, Projector, Any] | None = None
        self._hash: str | None = None
        self._checked = False
        self.storage_dtype: str = self.config.dtype

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            if self.source is None:
                raise ValueError(
                    "This Featurizer was made from a model in memory and has been sent to another process, where the model is "
                    "not. Save the model and make the Featurizer from the folder, or use num_proc=None."
                )
            self._model = load_model(self.source, self.revision)
        return self._model

    def prepare(self) -> tuple[Task, ParameterSelection, Projector, Any]:
        """Load what is needed, once: task, selected parameters, projector, and tokenizer or image processor.

        Raises:
            ValueError: If no task serves the model, a parameter pattern matches nothing, or `proj_dim` exceeds the gradient.
        """
        if self._ready is None:
            processing_class, task = self._given
            if task is None:
                task = AutoTask.from_model(self.model, self.config)
            if processing_class is None and self.source is not None:
                processing_class = load_processing_class(self.source, self.revision)
            selection = select_parameters(self.model, self.config.parameters)
            if self.config.proj_dim > selection.grad_dim:
                raise ValueError(
                    f"proj_dim={self.config.proj_dim:,} is more than the {selection.grad_dim:,} selected parameters: a sketch "
                    "cannot be longer than what it sketches. Choose a smaller proj_dim, or projector='identity' with "
                    f"proj_dim={selection.grad_dim}."
                )
            projector = make_projector(self.config.projector, proj_dim=self.config.proj_dim, seed=self.seed)
            if isinstance(projector, Identity):
                projector.lay_out({name: parameter.numel() for name, parameter in selection.parameters.items()})
            self.model.to(self.device)
            self._ready = task, selection, projector, processing_class
        return self._ready

    @property
    def task(self) -> Task:
        return self.prepare()[0]

    @property
    def selection(self) -> ParameterSelection:
        return self.prepare()[1]

    @property
    def processing_class(self) -> Any:
        return self.prepare()[3]

    def model_hash(self) -> str:
        """Return the SHA-256 of the model's weights and buffers."""
        if self._hash is None:
            self._hash = hash_tensors(self.model.state_dict())
        return self._hash

    def features(self, batch: Mapping[str, Tensor]) -> BatchFeatures:
        """Return the features of a batch that the task's collator made."""
        task, selection, projector, _ = self.prepare()
        batch = {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        arguments: dict[str, Any] = {
            "output_function": task.output_function,
            "parameters": selection.parameters,
            "projector": projector,
        }
        engine = GRADIENTS[self.config.gradients]
        if self.config.gradients == "functional":
            with vmappable_attention(self.model):
                return engine(self.model, batch, **arguments)
        if not self._checked:
            first = {key: value[:_CHECKED_ROWS] if isinstance(value, Tensor) else value for key, value in batch.items()}
            check_gradients(self.model, first, **arguments)
            self._checked = True
        return engine(self.model, batch, **arguments)

    def __call__(self, rows: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return the trak_* columns of some rows.

        Args:
            rows (`dict`): Columns, as `Dataset.map(batched=True)` passes them.
            indices (`Sequence[int]`, *optional*): The rows' ids, for error messages.

        Raises:
            ValueError: If a row's output or gradient is not finite; the message names the rows.
        """
        task, _, _, processing_class = self.prepare()
        features = self.features(task.collate(rows, processing_class))
        finite = features.features.isfinite().all(1) & features.output.isfinite() & features.out_to_loss.isfinite()
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            names = [indices[row] for row in bad] if indices is not None else bad
            raise ValueError(
                f"The gradients of {len(bad)} examples are not finite: rows {', '.join(map(str, names[:10]))}"
                f"{', ...' if len(bad) > 10 else ''}. Look for NaN in their inputs or in the model's weights, or overflow in half "
                "precision. Nothing of this shard was written."
            )
        return encode_columns(features.features, features.output, features.out_to_loss, dtype=self.storage_dtype)

    def __getstate__(self) -> dict[str, Any]:
        processing_class, task = self._given
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "source": self.source,
            "revision": self.revision,
            "model_hash": self.model_hash(),
            "processing_hash": hash_processing_class(processing_class),
            "task": task.name if task is not None else None,
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
            revision=state["revision"],
        )
        self._hash = state["model_hash"]


def load_model(source: str, revision: str | None = None) -> PreTrainedModel:
    """Load the class a checkpoint names in its `architectures`, from safetensors.

    Raises:
        FileNotFoundError: If there is no checkpoint at `source`.
        ValueError: If it names no class of transformers or `hf_trak.models`.
    """
    import transformers

    import hf_trak.models

    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{source!r} is neither a folder here nor a model repository within reach: {reason}") from error
    names = config.architectures or []
    for name in names:
        for library in (transformers, hf_trak.models):
            if hasattr(library, name):
                return getattr(library, name).from_pretrained(source, revision=revision, use_safetensors=True)
    raise ValueError(
        f"{source} names {', '.join(names) or 'no class'} as its architecture, which transformers does not have. Load the model "
        "yourself and pass it as `model`."
    )


def load_processing_class(source: str, revision: str | None = None) -> Any:
    """Load the tokenizer, image processor or both that are saved beside a checkpoint; None if there is none."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        return None


def hash_processing_class(processing_class: Any) -> str | None:
    """Return a hash of the files a tokenizer or image processor saves; None for none."""
    if processing_class is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        return hash_json({path.name: hash_file(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()})
