"""Which row of a dataset each training row of an index is, by the content of the columns that were read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_trak.sources.read_columns import file_columns
from hf_trak.sources.row_digests import digest_rows, spell_digests
from hf_trak.storage.columns import ROW_DIGEST
from hf_trak.storage.member_reader import MemberReader

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 5


def align_rows(train: Dataset, member: MemberReader, *, index: Path) -> Dataset:
    """Return the rows of `train` that are the index's, in the index's order: row i of the result is row i of the index.

    Of rows with the same content any may stand for any.

    Args:
        member ([`MemberReader`]): A member of the index; all have the same digests.
        index (`Path`): For messages.

    Raises:
        ValueError: If `train` lacks a column that rows are compared by, or some of the index's rows; the message names them.
    """
    described = member.identity["dataset"]
    digested = described.get("digested")
    if digested is None:
        raise ValueError(f"{index} records nothing of the content of its training rows; featurize again to have it.")
    if missing := [name for name in digested if name not in train.column_names]:
        raise ValueError(
            f"The training rows of {index} are told by the content of {_listed(digested)}, but this dataset lacks "
            f"{_listed(missing)}; it has {_listed(train.column_names)}. Give the training set as it was featurized, or build the index with "
            "`keep_columns` (--keep_columns), which needs no training set to show its rows."
        )
    found = digest_rows(train, digested, file_columns=file_columns(train.features, described["columns"]))
    there, here = _stored(member), pa.array(spell_digests(found), type=pa.string())
    places = pc.index_in(there, value_set=here)
    n_missing = places.null_count
    if n_missing:
        rows = np.flatnonzero(places.is_null().to_numpy(zero_copy_only=False))[:_SHOWN].tolist()
        raise ValueError(
            f"This is not the training set of {index}: {n_missing:,} of the index's {len(there):,} rows are not among the "
            f"{len(here):,} of this dataset, the first of them {_numbers(rows, n_missing)}. Rows are compared by the content of "
            f"{_listed(digested)}. Give the dataset that was featurized; its order does not matter, and it may have more rows."
        )
    chosen = places.to_numpy(zero_copy_only=False).astype(np.int64)
    shared = min(len(there), len(here))
    same = pc.equal(there.slice(0, shared), here.slice(0, shared)).to_numpy(zero_copy_only=False)
    chosen[:shared][same] = np.flatnonzero(same)  # of several rows of the same content, the one at the same place
    if len(train) == len(chosen) and (chosen == np.arange(len(chosen))).all():
        return train
    return train.select(chosen)


def _stored(member: MemberReader) -> pa.Array:
    """Return the digests of all training rows, in their order."""
    parts = []
    for path in member.shard_paths:
        try:
            parts.append(pq.read_table(path, columns=[ROW_DIGEST], page_checksum_verification=True).column(0))
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error
    return pa.concat_arrays([chunk.cast(pa.string()) for part in parts for chunk in part.chunks])


def _numbers(rows: list[int], count: int) -> str:
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}{', ...' if count > len(rows) else ''}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))
