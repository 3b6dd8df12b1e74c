"""What every baseline is, a callable of two datasets, and the checkpoints that most are built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from hf_trak.config import TrakConfig
from hf_trak.featurize import BatchSize, featurize_rows
from hf_trak.featurizer import Featurizer
from hf_trak.gradients import GRADIENTS, BatchFeatures
from hf_trak.projectors import Projector
from hf_trak.tasks import Task, vmappable_attention


@runtime_checkable
class Baseline(Protocol):
    """`(train, queries) -> scores`. A positive score marks a proponent: training on it speaks for the query."""

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        """Score every training example for every query."""
        ...


class Columns(NamedTuple):
    """Features of a dataset under one checkpoint, rows in its order."""

    features: Float[np.ndarray, "n proj_dim"]
    output: Float[np.ndarray, " n"]
    out_to_loss: Float[np.ndarray, " n"]


@dataclass
class Checkpoints:
    """The checkpoints a baseline looks at, and how it looks.

    Features are kept in memory, so that baselines built from one `Checkpoints` share them: the gradients of a dataset are computed
    once.

    Args:
        models (`PreTrainedModel`, `str`, `Path` or a sequence): Models, folders or repositories. Scores are averaged over them.
        config (`TrakConfig`, *optional*): Task, parameters and sketch. `projector="identity"` makes gradients exact.
        processing_class (*optional*): Tokenizer or image processor; by default the one saved beside each checkpoint.
        task (`Task`, *optional*): In place of the one `config` names.
        batch_size (`int` or `"auto"`): Rows at a time.
        device (*optional*): By default, CUDA where there is one.

    Raises:
        ValueError: If there is no checkpoint.
    """

    models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path]
    config: TrakConfig = field(default_factory=TrakConfig)
    processing_class: Any = None
    task: Task | None = None
    batch_size: int | str = "auto"
    device: str | torch.device | None = None
    _columns: dict[tuple[int, str], Columns] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.models, (list, tuple)):
            self.models = [self.models]
        if not self.models:
            raise ValueError("There is no checkpoint to score with: `models` is empty.")

    def __len__(self) -> int:
        return len(self.models)  # type: ignore[arg-type]

    def featurizer(self, number: int, *, sketched: bool = True) -> Featurizer:
        """Return the featurizer of one checkpoint; checkpoint i is sketched with `config.seed + i`, as member i of an index is.

        Args:
            sketched (`bool`): False where features are not wanted, so that `proj_dim` need not suit the model.
        """
        config = self.config if sketched else replace(self.config, projector="dense_rademacher", proj_dim=1)
        featurizer = Featurizer(
            self.models[number],  # type: ignore[index]
            config,
            self.processing_class,
            task=self.task,
            seed=self.config.seed + number,
            device=self.device,
        )
        featurizer.storage_dtype = "float32"
        return featurizer

    def columns(self, number: int, dataset: Dataset) -> Columns:
        """Return the features of a dataset under one checkpoint."""
        key = number, dataset._fingerprint
        if key not in self._columns:
            found = self.run(self.featurizer(number), dataset)
            self._columns[key] = Columns(found["trak_features"], found["trak_output"], found["trak_out_to_loss"])
        return self._columns[key]

    def run(
        self,
        featurizer: Featurizer,
        dataset: Dataset,
        call: Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return columns of a dataset, in its order: the trak_* columns, or what `call` makes of each batch.

        Raises:
            ValueError: If the dataset is empty or cannot serve the task.
        """
        if len(dataset) == 0:
            raise ValueError("There is nothing to score: a dataset is empty.")
        task, processing_class = featurizer.task, featurizer.processing_class
        task.check(dataset, processing_class)

        def call_on_rows(rows: Mapping[str, Sequence[Any]], ids: Sequence[int]) -> dict[str, np.ndarray]:
            if call is None:
                return featurizer(rows, ids)
            return dict(call(to_device(task.collate(rows, processing_class), featurizer.device)))

        lengths = task.inputs.lengths(dataset)
        size = BatchSize(self.batch_size)
        return featurize_rows(
            call_on_rows, dataset, range(len(dataset)), lengths=lengths, batch_size=size, on_batch=lambda _: None
        )

    def batches(self, featurizer: Featurizer, dataset: Dataset, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield batches of some rows of a dataset, in order."""
        size = BatchSize(self.batch_size).rows
        for start in range(0, len(rows), size):
            chosen = dataset[list(rows[start : start + size])]
            yield to_device(featurizer.task.collate(chosen, featurizer.processing_class), featurizer.device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def project_gradients(featurizer: Featurizer, batch: Mapping[str, Any], projector: Projector) -> BatchFeatures:
    """Return the per-example gradients of a batch under `projector`, in place of the featurizer's own sketch."""
    engine = GRADIENTS[featurizer.config.gradients]
    arguments: dict[str, Any] = {"output_function": featurizer.task.output_function, "projector": projector}
    parameters = featurizer.selection.parameters
    if featurizer.config.gradients == "functional":
        with vmappable_attention(featurizer.model):
            return engine(featurizer.model, batch, parameters=parameters, **arguments)
    return engine(featurizer.model, batch, parameters=parameters, **arguments)


def similarity(
    train: Float[np.ndarray, "n_train dim"], queries: Float[np.ndarray, "n_query dim"], kind: str
) -> Float[np.ndarray, "n_train n_query"]:
    """Return the inner products (`"dot"`) or cosines (`"cosine"`) of the rows of two matrices, in float64.

    A row of zeros has no direction; its cosines are 0.

    Raises:
        ValueError: If `kind` is neither.
    """
    if kind not in ("dot", "cosine"):
        raise ValueError(f"`similarity` must be 'dot' or 'cosine', but is {kind!r}.")
    train, queries = train.astype(np.float64), queries.astype(np.float64)
    return train @ queries.T if kind == "dot" else _normalized(train) @ _normalized(queries).T


def _normalized(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def check_scores(scores: np.ndarray, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
    """Return `scores` if they are finite and one per pair.

    Raises:
        ValueError: If the shape is wrong, or naming how many are not finite.
    """
    if scores.shape != (len(train), len(queries)):
        raise ValueError(
            f"Expected scores of shape (n_train, n_query) = ({len(train)}, {len(queries)}), but they are {scores.shape}."
        )
    bad = int((~np.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"{bad} of {scores.size} scores are not finite. Look for NaN in the model's weights or in its inputs.")
    return scores
