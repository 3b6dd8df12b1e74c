"""The rows of a training set as an index knows them: by their content, what of them is read, and what of them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from hf_trak.config import TrakConfig
from hf_trak.featurizing.descriptions import describe_task_code
from hf_trak.sources.kept_columns import check_kept, take_kept
from hf_trak.sources.read_columns import columns_to_digest, file_columns, in_order, label_names
from hf_trak.sources.row_digests import digest_rows, hash_digests, spell_digests
from hf_trak.sources.transforms import describe_transform
from hf_trak.storage.columns import ROW_DIGEST
from hf_trak.tasks import Task
from hf_trak.tasks.rows import features_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TrainingRows:
    """What decides an index's rows on the side of the data.

    Args:
        columns (`dict`): Which columns the task reads and as what, from [`Task.columns_read`].
        label_names (`list[str]`, *optional*): The names of the label column's classes.
        digested (`list[str]`): The columns whose content the digests are of.
        digests (`np.ndarray`): A digest per row.
        described (`dict`): What else tells these rows from others: a transform, how labels are translated, the code of a custom task.
        kept (`tuple[str, ...]`): Columns that are stored with the features.
    """

    dataset: Dataset
    columns: dict[str, Any]
    label_names: list[str] | None
    digested: list[str]
    digests: UInt8[np.ndarray, "n_rows 16"]
    described: dict[str, Any]
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset, task: Task, keep_columns: Sequence[str] = ()) -> TrainingRows:
        """Read a training set for a task.

        Raises:
            ValueError: If a column to be kept is not there.
        """
        kept = check_kept(dataset, keep_columns)
        features: Any = features_of(dataset)
        columns = in_order(task.columns_read(features))
        digested = columns_to_digest(dataset, columns)
        described: dict[str, Any] = {}
        if (transform := describe_transform(dataset)) is not None:
            described["transform"] = transform
        if task.translation is not None:
            described["label_translation"] = list(task.translation)
        described |= describe_task_code(task)
        digests = digest_rows(dataset, digested, file_columns=file_columns(features, columns))
        return cls(dataset, columns, label_names(features, columns), digested, digests, described, kept)

    def recorded_in(self, config: TrakConfig) -> TrakConfig:
        """Return a configuration that says what was read of these rows."""
        return replace(config, columns_read=self.columns, label_names=tuple(self.label_names or ()) or None)

    def identity(self) -> dict[str, Any]:
        """Return what is compared when a run is continued: the same content in another file is the same."""
        return {
            "sha256": hash_digests(self.digests),
            "columns": self.columns,
            "label_names": self.label_names,
            "digested": self.digested,
            **self.described,
        }

    def kept_identity(self) -> dict[str, Any]:
        """Return what tells the kept columns from others, as part of the identity of the member that has them; nothing if none are."""
        if not self.kept:
            return {}
        digests = digest_rows(self.dataset, self.kept)
        return {"kept": {"columns": list(self.kept), "sha256": hash_digests(digests)}}

    def digest_column(self, rows: range) -> pa.Table:
        """Return the column that every member stores of some rows."""
        return pa.table({ROW_DIGEST: spell_digests(self.digests[rows.start : rows.stop])})

    def all_columns(self, rows: range) -> pa.Table:
        """Return the columns that the first member stores of some rows: their digests, and what is kept."""
        table = self.digest_column(rows)
        if not self.kept:
            return table
        kept = take_kept(self.dataset, self.kept, rows)
        for name in self.kept:
            table = table.append_column(kept.schema.field(name), kept.column(name))
        return table.replace_schema_metadata(kept.schema.metadata)
