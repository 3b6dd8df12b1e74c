"""What every baseline is, a callable of two datasets, and the checkpoints that most are built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from hf_trak.config import TrakConfig
from hf_trak.featurizing.batching import BatchSize, ShardBatches
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.loop import featurize_rows
from hf_trak.gradients import BatchFeatures
from hf_trak.hashing import fingerprint_of
from hf_trak.projectors import Projector
from hf_trak.tasks import Task, TaskMaker, minus_loss, needs_bank

GradientOf = Literal["loss", "output"]


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

    A dual encoder's pairs are held against a bank of the training set, made anew for each checkpoint; gradients of its loss are those
    of the contrastive loss against that bank.

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
    task: Task | TaskMaker | None = None
    batch_size: int | str = "auto"
    device: str | torch.device | None = None
    _columns: dict[tuple[int, str, str, str], Columns] = field(default_factory=dict, init=False, repr=False)

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
        return Featurizer(
            self.models[number],  # type: ignore[index]
            config,
            self.processing_class,
            task=self.task,
            seed=self.config.sketch_seed + number,
            device=self.device,
        )

    def columns(self, number: int, dataset: Dataset, *, train: Dataset | None = None, of: GradientOf = "output") -> Columns:
        """Return the features of a dataset under one checkpoint.

        Args:
            train (`Dataset`, *optional*): The training set. A dual encoder's bank is drawn from it; no other task looks at it.
            of (`"output"` or `"loss"`): What will be compared. One pass serves both, with `out_to_loss` between them, except for a dual
                encoder: for `"loss"` its output is minus the loss and `out_to_loss` is 1.

        Raises:
            ValueError: If the model is a dual encoder, and there is no training set for its bank.
        """
        shared = (number, fingerprint_of(dataset), "", "")
        own = (number, fingerprint_of(dataset), fingerprint_of(train) if train is not None else "", of)
        if not {shared, own} & self._columns.keys():
            featurizer = self.featurizer(number)
            _check(featurizer, dataset)
            _hold_against(featurizer, train, of)
            found = featurize_rows(featurizer, dataset, range(len(dataset)), batch_size=self.batch_size)
            self._columns[own if needs_bank(featurizer.task) else shared] = Columns(
                found.features.numpy(), found.output.numpy(), found.out_to_loss.numpy()
            )
        return self._columns[own] if own in self._columns else self._columns[shared]

    def run(
        self,
        featurizer: Featurizer,
        dataset: Dataset,
        call: Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]],
    ) -> dict[str, np.ndarray]:
        """Return what `call` makes of each batch, as columns in the dataset's order.

        Raises:
            ValueError: If the dataset is empty or cannot serve the task.
        """
        _check(featurizer, dataset)
        rows = range(len(dataset))
        size = BatchSize(self.batch_size, automatic=featurizer.budget)
        batches = ShardBatches(rows, featurizer.lengths(dataset), size).batches()
        results = [call(self._batch(featurizer, dataset, chosen)) for chosen in batches]
        place = np.argsort([row for chosen in batches for row in chosen])
        return {name: np.concatenate([result[name] for result in results])[place] for name in results[0]}

    def batches(self, featurizer: Featurizer, dataset: Dataset, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield batches of some rows of a dataset, in order."""
        size = self.rows_at_a_time(featurizer)
        for start in range(0, len(rows), size):
            yield self._batch(featurizer, dataset, rows[start : start + size])

    def rows_at_a_time(self, featurizer: Featurizer) -> int:
        """Return the setting as a number of rows."""
        return BatchSize(self.batch_size, automatic=featurizer.budget).budget.rows

    @staticmethod
    def _batch(featurizer: Featurizer, dataset: Dataset, rows: Sequence[int]) -> dict[str, Any]:
        return featurizer.collate(dataset[list(rows)]).to(featurizer.device)


def _hold_against(featurizer: Featurizer, train: Dataset | None, of: GradientOf) -> None:
    """Give a dual encoder the bank that its pairs are held against; other tasks have none."""
    if not needs_bank(featurizer.task):
        return
    if train is None:
        raise ValueError(
            f"{type(featurizer.model).__name__} holds each pair against a bank of training pairs, so its gradients need the training "
            "set: call `columns(number, dataset, train=train)`."
        )
    featurizer.make_bank(train)
    if of == "loss":
        featurizer.use_task(minus_loss(featurizer.task))


def _check(featurizer: Featurizer, dataset: Dataset) -> None:
    if len(dataset) == 0:
        raise ValueError("There is nothing to score: a dataset is empty.")
    featurizer.check(dataset)


def project_gradients(featurizer: Featurizer, batch: Mapping[str, Any], projector: Projector) -> BatchFeatures:
    """Return the per-example gradients of a batch under `projector`, in place of the featurizer's own sketch."""
    return featurizer.features(batch, projector=projector)


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
