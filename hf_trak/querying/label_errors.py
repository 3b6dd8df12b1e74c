"""The Dataset that [`AttributionIndex.label_errors`] returns: rows by suspicion, their given and suggested labels, and their columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64

from hf_trak.querying.training_rows import KeptRows, align_rows
from hf_trak.runtime import dataset_bars
from hf_trak.scoring.label_errors import LabelEvidence, Suspicion, suggest_labels
from hf_trak.storage.reader import MemberReader

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

_LABEL_COLUMNS = ("labels", "label")


def check_budget(budget: int | float | None, n_rows: int) -> int:
    """Return how many rows to report.

    Raises:
        ValueError: If it is neither a whole number of at least 1 nor a share above 0 and below 1.
    """
    if budget is None:
        return n_rows
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    if (whole and budget >= 1) or (isinstance(budget, float) and 0 < budget < 1):
        return min(n_rows, budget if isinstance(budget, int) else max(1, round(budget * n_rows)))
    raise ValueError(
        f"`budget` must be a number of rows, of at least 1, or a share of them above 0 and below 1, but is {budget!r}."
    )


class GivenLabels:
    """The labels of a training set as it has them.

    Args:
        train (`Dataset`): The training set, in the index's order.
        label_column (`str`, *optional*): By default `labels` or `label`.

    Raises:
        ValueError: If the rows are not as many as the index's, there is no label column, a label is missing or is no class, or all rows
            have the same.
    """

    def __init__(self, train: Dataset, *, n_rows: int, label_column: str | None) -> None:
        if len(train) != n_rows:
            raise ValueError(
                f"`train` has {len(train):,} rows, but the index was made of {n_rows:,}: it is not the training set, or not the whole of it."
            )
        self.train = train.with_format(None)
        candidates = (label_column,) if label_column else _LABEL_COLUMNS
        found = [name for name in candidates if name in train.column_names]
        if not found:
            raise ValueError(
                f"`train` has no label column {' or '.join(map(repr, candidates))}; it has {', '.join(train.column_names)}."
            )
        self.column = found[0]
        values = self.train[self.column][:]
        if unusable := [row for row, value in enumerate(values) if not _is_class(value)]:
            raise ValueError(
                f"{len(unusable)} of {n_rows} labels in column {self.column!r} of `train` are no class, the first at row {unusable[0]}: "
                f"{values[unusable[0]]!r}. Expected whole numbers or names."
            )
        self.classes, codes = np.unique(np.array(values), return_inverse=True)
        self.codes: Int64[torch.Tensor, " n_train"] = torch.from_numpy(codes.astype(np.int64))
        if len(self.classes) < 2:
            raise ValueError(
                f"All {n_rows} labels in column {self.column!r} of `train` are {values[0]!r}: where there is one class, no label can be "
                "told from another."
            )


def given_labels(train: Dataset | None, member: MemberReader, *, label_column: str | None, index: Path) -> GivenLabels | None:
    """Return the labels of a training set, brought to the index's order; without one, those that the index kept, if it did.

    Raises:
        ValueError: As [`align_rows`] and [`GivenLabels`].
    """
    if train is not None:
        return GivenLabels(align_rows(train, member, index=index), n_rows=member.n_rows, label_column=label_column)
    kept = KeptRows(member)
    candidates = (label_column,) if label_column else _LABEL_COLUMNS
    found = next((name for name in candidates if name in kept.column_names), None)
    if found is None:
        return None
    labels = kept.take(range(len(kept)), columns=[found])
    return GivenLabels(labels, n_rows=member.n_rows, label_column=found)


def _is_class(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, str))


def label_error_rows(
    evidence: LabelEvidence,
    suspicion: Suspicion,
    given: GivenLabels | None,
    n_reported: int,
    kept_rows: KeptRows | None = None,
) -> Dataset:
    """Return the most suspicious rows, the worst first; equally suspicious ones in the training set's order.

    Args:
        kept_rows ([`KeptRows`], *optional*): Whose columns are returned in place of those of a training set.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets

    rows = torch.argsort(suspicion.score, descending=True, stable=True)[:n_reported]
    kinds: dict[str, Any] = {"rank": Value("int64"), "row": Value("int64")}
    kinds |= {name: Value("float64") for name in ("score", "evidence", "doubt")}
    columns: dict[str, Any] = {"rank": np.arange(1, len(rows) + 1), "row": rows.numpy()}
    columns |= {name: getattr(suspicion, name)[rows].numpy() for name in ("score", "evidence", "doubt")}
    if given is not None:
        suggested = suggest_labels(evidence, given.codes)
        for name, codes in (("given_label", given.codes), ("suggested_label", suggested)):
            kinds[name] = given.train.features[given.column]
            columns[name] = given.classes[codes[rows].numpy()].tolist()
    found = Dataset.from_dict(columns, features=Features(kinds))
    source = kept_rows if kept_rows is not None else given.train if given is not None else None
    label = given.column if given is not None else None
    kept = [] if source is None else [name for name in source.column_names if name != label and name not in columns]
    if not kept:
        return found
    if kept_rows is not None:
        beside = kept_rows.take(rows.tolist(), columns=kept)
    else:
        assert given is not None
        with dataset_bars(shown=False):
            beside = given.train.select_columns(kept).select(rows.tolist()).flatten_indices()
    return concatenate_datasets([found, beside], axis=1)
