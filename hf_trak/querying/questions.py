"""What is asked of an index: which outputs of which queries, or features of queries that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from hf_trak.tasks import Task
from hf_trak.tasks.answers import answer_task

if TYPE_CHECKING:
    from datasets import Dataset

AGGREGATES = ("mean", "sum", "nearest")


@dataclass(frozen=True)
class Question:
    """Which output of each query is attributed, and whether many queries are one; see [`AttributionIndex.score`]."""

    target: str | int = "label"
    contrast: Sequence[str | int] | None = None
    direction: str = "pair"
    aggregate: str | None = None

    def __post_init__(self) -> None:
        if self.aggregate is not None and self.aggregate not in AGGREGATES:
            raise ValueError(f"`aggregate` must be {', '.join(map(repr, AGGREGATES))} or None, but is {self.aggregate!r}.")
        if self.contrast is None:
            return
        if isinstance(self.contrast, str) or not isinstance(self.contrast, Sequence) or len(self.contrast) != 2:
            raise ValueError(f"`contrast` must be two classes, 'label' or 'prediction', but is {self.contrast!r}.")
        if self.contrast[0] == self.contrast[1]:
            raise ValueError(f"`contrast` must be of two different outputs, but is {self.contrast!r}: all scores would be 0.")
        if self.target != "label":
            raise ValueError(f"`contrast` says itself what is attributed: leave out target={self.target!r}.")

    @property
    def targets(self) -> list[tuple[float, str | int]]:
        """What is attributed: one output, or two with opposite signs."""
        return [(1.0, self.target)] if self.contrast is None else [(1.0, self.contrast[0]), (-1.0, self.contrast[1])]

    def n_columns(self, n_query: int) -> int:
        """Return how many columns the scores of some queries have."""
        return min(n_query, 1) if self.aggregate is not None else n_query

    def join(self, values: Tensor, *, linear: bool = True) -> Tensor:
        """Return features or outputs of many queries as those of one, where they are one.

        Args:
            linear (`bool`): Of "nearest", features stay apart, and outputs do not: of these the mean is taken.
        """
        if self.aggregate is None or (self.aggregate == "nearest" and linear):
            return values
        total = values.double().sum(0, keepdim=True)
        return (total if self.aggregate == "sum" else total / len(values)).to(values.dtype)


@dataclass(frozen=True)
class Side:
    """Queries with one output each; their features are added with a sign.

    Args:
        reads (`str`): "label": rows as the training set's; "target": without labels, and with [`TARGET_COLUMN`]; "answer": tokens of a
            prompt and an answer; "document": texts, of an index of chunks, that are cut as its documents were, or prompts and answers.
        names (`Sequence[str]`): Of the model's classes, where there are targets.
    """

    queries: Dataset
    sign: float = 1.0
    reads: str = "label"
    names: Sequence[str] = ()

    def task(self, task: Task) -> Task:
        """Return the task that reads these queries."""
        if self.reads == "answer" or (self.reads == "document" and not self._has_texts(task)):
            return answer_task(task)
        return task.for_targets() if self.reads == "target" else task

    def _has_texts(self, task: Task) -> bool:
        return bool(set(getattr(task.inputs, "text_columns", None) or ()) & set(self.queries.column_names))


def read_query_features(features: Any, *, n_members: int, proj_dim: int) -> list[Float32[Tensor, "n_query proj_dim"]]:
    """Return the features of every member, as float32 tensors.

    Args:
        features: An array or tensor of shape (n_query, proj_dim), or a Dataset with the column `trak_features` (and `trak_scale`, where it is
            stored in float16); or, for several members, a list with one of these for each.

    Raises:
        ValueError: If there is not one per member, they do not have `proj_dim` numbers each, or a number is not finite.
    """
    given = list(features) if isinstance(features, (list, tuple)) else [features]
    if len(given) != n_members:
        raise ValueError(
            f"This index has {n_members} members, but features of {len(given)} were given. Give a list with those of each member, made "
            "by `index.featurizer(member)`."
        )
    found = [_read(one) for one in given]
    for number, rows in enumerate(found):
        if rows.ndim != 2 or rows.shape[1] != proj_dim or len(rows) != len(found[0]):
            raise ValueError(
                f"Query features of member {number} must have the shape ({len(found[0])}, {proj_dim}), but have {tuple(rows.shape)}."
            )
        if not bool(rows.isfinite().all()):
            bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"Query features of member {number} hold NaN or infinity in rows {', '.join(map(str, bad[:10]))}"
                f"{' and others' if len(bad) > 10 else ''}, {len(bad)} in all. Leave these queries out, or featurize them again."
            )
    return found


def mean_output(features: Any) -> np.ndarray | None:
    """Return the mean over members of the queries' outputs, where all of them record it."""
    given: Sequence[Any] = features if isinstance(features, (list, tuple)) else [features]
    if not all("trak_output" in getattr(one, "column_names", ()) for one in given):
        return None
    return np.mean([np.asarray(one.with_format("numpy")["trak_output"][:], dtype=np.float32) for one in given], axis=0)


def _read(features: Any) -> Tensor:
    if isinstance(features, Tensor):
        return features.detach().cpu().float()
    names = getattr(features, "column_names", None)
    if names is None:
        return torch.from_numpy(np.array(features, dtype=np.float32))
    if "trak_features" not in names:
        raise ValueError(
            f"These queries have no column trak_features; they have {', '.join(names)}. Make it with "
            "`queries.map(index.featurizer(), batched=True)`, or ask `index.attribute(queries)`."
        )
    rows = features.with_format("numpy", dtype=np.float32)
    values = torch.from_numpy(np.array(rows["trak_features"][:], dtype=np.float32))
    return values * torch.from_numpy(np.array(rows["trak_scale"][:])).unsqueeze(1) if "trak_scale" in names else values
