"""The training rows behind an index: kept columns read back, and the rows of a dataset aligned by content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from hf_trak.sources.row_digests import digest_rows, file_columns, spell_digests
from hf_trak.storage.columns import ROW_DIGEST
from hf_trak.storage.reader import MemberReader
from hf_trak.tasks.chunks import CHUNK_COLUMNS, DIGEST, START, STOP, is_chunked
from hf_trak.tasks.columns import is_string

if TYPE_CHECKING:
    from datasets import Dataset, Features


class KeptRows:
    """The columns of the training set that were kept (`keep_columns`), by row; empty where none were.

    Args:
        member ([`MemberReader`]): The index's first, which has them.
    """

    def __init__(self, member: MemberReader) -> None:
        self._member = member
        self.column_names: list[str] = list(member.identity.get("kept", {}).get("columns", []))

    def __len__(self) -> int:
        return self._member.n_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return the kept columns of a row, decoded as by the training set."""
        from datasets import Dataset
        from datasets.table import InMemoryTable

        return Dataset(InMemoryTable(self._table([row], self.column_names)), fingerprint="row")[0]  # which saves hashing it

    @functools.cached_property
    def features(self) -> Features:
        """The features of the kept columns, as the training set had them."""
        from datasets import Features

        with pq.ParquetFile(self._member.shard_paths[0]) as file:
            found = Features.from_arrow_schema(file.schema_arrow)
        return Features({name: found[name] for name in self.column_names})

    @property
    def mean_bytes(self) -> int:
        """The bytes of the kept columns of a row, in the mean, as a Parquet file has them."""
        return self._mean_bytes(lambda kind: True)

    @property
    def mean_bytes_as_text(self) -> int:
        """The bytes of the kept columns of a row, in the mean, as JSON has them, without images and other bytes: a third more than the
        content, and the quotes."""
        return self._mean_bytes(lambda kind: "binary" not in str(kind)) * 4 // 3 + 4 * len(self.column_names)

    def _mean_bytes(self, counts: Callable[[pa.DataType], bool]) -> int:
        if not self.column_names:
            return 0
        n_bytes = 0
        with pq.ParquetFile(self._member.shard_paths[0]) as file:
            wanted = {name for name in self.column_names if counts(file.schema_arrow.field(name).type)}
            for group in range(file.num_row_groups):
                described = file.metadata.row_group(group)
                chunks = (described.column(number) for number in range(described.num_columns))
                n_bytes += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in wanted)
            return n_bytes // file.metadata.num_rows

    def take(self, rows: Sequence[int], *, columns: Sequence[str] | None = None) -> Dataset:
        """Return some rows, in the order given.

        Args:
            columns (`Sequence[str]`, *optional*): By default, all that were kept.

        Raises:
            IndexError: If a row is not one of the index's.
            ValueError: If a file is damaged.
        """
        from datasets import Dataset
        from datasets.table import InMemoryTable

        return Dataset(InMemoryTable(self._table(rows, self.column_names if columns is None else list(columns))))

    def _table(self, rows: Sequence[int], names: list[str]) -> pa.Table:
        from datasets import Features

        features = Features({name: self.features[name] for name in names})
        wanted, inverse = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < len(self):
            raise IndexError(
                f"The index has rows 0 to {len(self) - 1}, but row {wanted[0] if wanted[0] < 0 else wanted[-1]} was asked for."
            )
        parts = list(self._read(wanted, names))
        table = pa.concat_tables(parts) if parts else features.arrow_schema.empty_table()
        return table.take(inverse).cast(features.arrow_schema)

    def _read(self, rows: Int64[np.ndarray, " n"], names: list[str]) -> Iterator[pa.Table]:
        """Yield sorted rows, from the row groups that have them."""
        shard_rows = self._member.identity["shard_rows"]
        for shard in np.unique(rows // shard_rows).tolist():
            path = self._member.shard_paths[shard]
            inside = rows[rows // shard_rows == shard] - shard * shard_rows
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                    stops = np.cumsum(sizes)
                    for group, (size, stop) in enumerate(zip(sizes, stops.tolist(), strict=True)):
                        here = inside[(inside >= stop - size) & (inside < stop)] - (stop - size)
                        if len(here):
                            yield file.read_row_group(group, columns=names).select(names).take(here)
            except (pa.ArrowException, OSError, KeyError) as error:
                raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error

    def beside(self, hits: Dataset) -> Dataset:
        """Return hits with the kept columns of their rows: `proponent_<column>` and `opponent_<column>`, lists in the rows' order."""
        from datasets import Dataset, Features, List, concatenate_datasets
        from datasets.table import InMemoryTable

        names = [name for name in self.column_names if name != DIGEST]
        if not names:
            return hits
        arrays: dict[str, pa.Array] = {}
        features: dict[str, Any] = {}
        for kind in ("proponent", "opponent"):
            column = (
                f"{kind}_rows" if f"{kind}_rows" in hits.column_names else f"{kind}s"
            )  # of documents, their strongest chunks
            rows = hits.with_format("arrow")[:][column].combine_chunks()
            flat = rows.flatten().to_numpy(zero_copy_only=False)
            found = self.take(np.maximum(flat, 0))
            places = pa.array(np.arange(len(flat)), mask=flat < 0)  # a row of −1 is none found, by a search index
            offsets = np.concatenate([[0], np.cumsum(rows.value_lengths().to_numpy(zero_copy_only=False))]).astype(np.int32)
            for name in names:
                values = found.data.column(name).combine_chunks().take(places)
                arrays[f"{kind}_{name}"] = pa.ListArray.from_arrays(offsets, values)
                features[f"{kind}_{name}"] = List(found.features[name])
        schema = Features(features).arrow_schema
        # Only what differs is cast: pyarrow cannot cast lists of nulls, not even to their own type.
        same = {
            name: values if values.type == schema.field(name).type else values.cast(schema.field(name).type)
            for name, values in arrays.items()
        }
        table = pa.table(same, schema=schema)
        return concatenate_datasets([hits, Dataset(InMemoryTable(table))], axis=1)


_SHOWN = 5


def align_rows(train: Dataset, member: MemberReader, *, index: Path) -> Dataset:
    """Return the rows of `train` that are the index's, in the index's order: row i of the result is row i of the index.

    Of rows with the same content any may stand for any.

    Args:
        member ([`MemberReader`]): A member of the index; all have the same digests.
        index (`Path`): For messages.

    Raises:
        ValueError: If `train` is no Dataset, or lacks a column that rows are compared by, or some of the index's rows; the message names them.
    """
    if not hasattr(train, "select") or not hasattr(train, "features"):
        raise ValueError(
            f"The training rows of {index} are looked for in a `datasets.Dataset`, but {type(train).__name__} was given. Of a DatasetDict, "
            "choose a split; of a streaming dataset, load it without streaming=True."
        )
    kept = KeptRows(member)
    if DIGEST in kept.column_names and not is_chunked(train.column_names):
        return _align_documents(train, kept, index=index)
    if DIGEST in kept.column_names and set(CHUNK_COLUMNS) <= set(train.column_names):
        chunks = kept.take(range(len(kept)), columns=CHUNK_COLUMNS)
        if train.select_columns(chunks.column_names).to_dict() == chunks.to_dict():
            return train  # they were aligned before
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


def _align_documents(documents: Dataset, kept: KeptRows, *, index: Path) -> Dataset:
    """Return the chunks of an index with their texts, from the documents that they were cut from."""
    from datasets import Dataset

    chunks = kept.take(range(len(kept)), columns=CHUNK_COLUMNS).to_dict()
    wanted = set(chunks[DIGEST])
    strings = [name for name, kind in documents.features.items() if is_string(kind)]
    found: dict[str, dict[str, int]] = {}
    for name in strings:
        places = {digest: place for place, digest in enumerate(spell_digests(digest_rows(documents, [name])))}
        if wanted <= set(places):
            break
        found[name] = places
    else:
        best = max((len(wanted & set(places)) for places in found.values()), default=0)
        raise ValueError(
            f"This is not the training set of {index}: of its {len(wanted):,} documents, {best:,} are among the {len(documents):,} of this dataset. "
            f"Documents are told by the content of their texts; the dataset has {_listed(documents.column_names)}. Give the dataset that was "
            "featurized; its order does not matter, and it may have more rows."
        )
    texts: list[str] = []
    raw = documents.with_format(None).select_columns([name])
    last: tuple[str, str] = ("", "")
    for digest, start, stop in zip(chunks[DIGEST], chunks[START], chunks[STOP], strict=True):
        if digest != last[0]:
            last = digest, raw[places[digest]][name]
        texts.append(last[1][start:stop])
    return Dataset.from_dict({name: texts, **chunks})


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
