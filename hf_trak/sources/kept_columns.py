"""Columns of a training set that are stored with its features, so that an index can show its rows without the training set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

# `attribute` calls them proponent_<column> and opponent_<column>, next to proponent_scores.
_TAKEN = ("example_id", "scores")


def check_kept(dataset: Dataset, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to be kept.

    Raises:
        ValueError: If the dataset lacks one, one is named twice, or has a name that the index uses.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {', '.join(map(repr, missing))}, but the dataset has "
            f"{', '.join(dataset.column_names)}."
        )
    twice = sorted({column for column in columns if list(columns).count(column) > 1})
    if twice:
        raise ValueError(f"`keep_columns` (--keep_columns) names {', '.join(map(repr, twice))} twice; name each column once.")
    taken = [column for column in columns if column in _TAKEN or column.startswith("trak_")]
    if taken:
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {', '.join(map(repr, taken))}, a name that the index uses for a column of its "
            "results; rename the column first, with `dataset.rename_column`."
        )
    return tuple(columns)


def take_kept(dataset: Dataset, columns: Sequence[str], rows: range) -> pa.Table:
    """Return some rows of the kept columns, typed as in the dataset; files of images and sound are taken in.

    The schema's metadata describes the features, as `datasets` writes it, so that `load_dataset` finds them again.
    """
    from datasets import Features
    from datasets.table import embed_table_storage, table_cast

    schema = Features({column: dataset.features[column] for column in columns}).arrow_schema
    raw = dataset.with_format(None).select_columns(list(columns)).with_format("arrow")
    table = raw[rows.start : rows.stop].select(list(columns))
    return embed_table_storage(table_cast(table, schema).replace_schema_metadata(schema.metadata), remote_files=False)
