"""Checks before a build: the training rows as an index records them, and a rehearsal on two of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64, UInt8

from hf_trak.config import TrakConfig
from hf_trak.featurizing.batching import read_rows
from hf_trak.featurizing.devices import check_whole
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.identity import describe_task_code
from hf_trak.hashing import fingerprint_of, hash_json
from hf_trak.sources.processors import describe_processing, tokenizer_of
from hf_trak.sources.row_digests import (
    check_kept,
    columns_to_digest,
    digest_rows,
    file_columns,
    hash_digests,
    in_order,
    label_names,
    spell_digests,
    take_kept,
)
from hf_trak.sources.transforms import describe_transform
from hf_trak.storage.columns import ROW_DIGEST
from hf_trak.tasks import Task, draw_rows, needs_bank
from hf_trak.tasks.chunks import CHUNK_COLUMNS, DOCUMENT, Chunker, cut_documents, is_chunked
from hf_trak.tasks.rows import as_stored, features_of

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from hf_trak.tasks import Task, TaskMaker


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


def as_chunks(
    config: TrakConfig,
    inputs: Any,
    processing_class: Any,
    dataset: Dataset,
    keep_columns: Sequence[str] = (),
    *,
    progress: bool = True,
) -> tuple[Dataset, tuple[str, ...], Int64[np.ndarray, " n_rows"] | None]:
    """Return the training rows of an index whose texts are cut into chunks (`chunk_overlap`), with the columns to keep of them, and the
    document of each; of any other, the dataset as it is.

    Args:
        config (`TrakConfig`): One that names the column of texts; see [`with_text_column`].
        inputs: Of the task that reads the texts.

    Raises:
        ValueError: If the task reads no texts that can be cut, or a document cannot serve.
    """
    keep = tuple(keep_columns)
    if is_chunked(dataset.column_names):
        return dataset, tuple(dict.fromkeys([*(name for name in CHUNK_COLUMNS if name in dataset.column_names), *keep])), None
    if config.chunk_overlap is None:
        return dataset, keep, None
    if config.text_columns is None:
        raise ValueError("`chunk_overlap` (--chunk_overlap) is for causal language models of texts: leave it out.")
    check_kept(dataset, keep)
    column = config.text_columns[0]
    tokenizer = tokenizer_of(processing_class)
    chunker = Chunker.of(inputs, tokenizer, config.chunk_overlap)
    digests = digest_rows(dataset, [column])
    described = describe_processing(tokenizer, pixels=False)
    decisive = [fingerprint_of(dataset), hash_digests(digests), described, chunker.limit, chunker.overlap, column, keep]
    chunks = cut_documents(
        dataset,
        chunker,
        column,
        digests=spell_digests(digests),
        keep=keep,
        skip_unscored=config.skip_unscored,
        fingerprint=hash_json(decisive)[:16],
        progress=progress,
    )
    documents = chunks.with_format("numpy").select_columns([DOCUMENT])[:][DOCUMENT] if len(chunks) else np.zeros(0, np.int64)
    return chunks, (*CHUNK_COLUMNS, *keep), documents


logger = logging.getLogger(__name__)

_ROWS = 2


def check_rows_before_training(
    model: nn.Module | Path,
    dataset: Dataset,
    config: TrakConfig,
    *,
    processing_class: Any,
    task: Task | TaskMaker | None,
    dropout_seed: int | None,
    device: torch.device,
) -> Featurizer:
    """Check that a training set can be featurized under a model or snapshot, and return what would do it.

    Raises:
        ValueError: Whatever `featurize()` would raise: no task, no processor, rows that cannot serve, gradients that are not found.
    """
    featurizer = Featurizer(
        model,
        config,
        processing_class,
        task=task,
        dropout_seed=dropout_seed,
        device=device,
    )
    check_whole(featurizer.model)
    dataset = as_stored(dataset)
    featurizer.read_from(dataset)
    featurizer.task.check(dataset, featurizer.processing_class)
    if needs_bank(featurizer.task):
        draw_rows(len(dataset), config.bank_size, config.bank_seed)  # raises for a bank that is larger than the training set
        return featurizer
    rows = list(range(min(_ROWS, len(dataset))))
    try:
        featurizer.check_first_rows(dataset)
        featurizer.lengths(dataset.select(rows))
        featurizer.compute(featurizer.collate(read_rows(dataset, rows)), rows)
    except torch.OutOfMemoryError:
        logger.warning(
            "There is no memory on %s to featurize two rows before training; whether it can be done is not known.", device
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # of the user's task or collator, or of the model's code
        raise ValueError(
            f"Featurizing failed for rows {', '.join(map(str, rows))} of the training set, so it would fail after training, too: "
            f"{type(error).__name__}: {error}. Check the `task` and its collator, and that they take the training set's rows "
            f"({', '.join(dataset.column_names)})."
        ) from error
    return featurizer
