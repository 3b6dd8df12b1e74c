"""The trak_* columns: from tensors to Arrow tables, and from Parquet shards back to tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.messages import DamagedFile
from hf_trak.storage.format import Origin, read_origin, refuse_other_origin, write_origin

ROW_DIGEST = "trak_row_digest"
_READ = ("example_id", "trak_features", "trak_scale", "trak_out_to_loss", "trak_output")


class Shard(NamedTuple):
    """Rows of one shard, in the training set's order."""

    example_id: Int64[Tensor, " rows"]
    features: Float[Tensor, "rows proj_dim"]
    out_to_loss: Float[Tensor, " rows"]
    output: Float[Tensor, " rows"]


def encode_columns(
    features: Float[Tensor, "rows proj_dim"],
    output: Float[Tensor, " rows"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of rows whose tensors are on the CPU.

    In float16, each row is divided by `trak_scale`, the power of two above its largest entry, so that no row under- or overflows. In
    float32 there is no such column.
    """
    # Differs from the reference: MadryLab/trak stores float16 unscaled, and rows of gradients below about 0.1 become zero.
    columns = {"trak_features": features.float().numpy()}
    if dtype == "float16":
        largest = features.abs().amax(dim=1).double().clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.exp2(largest.log2().floor() + 1)
        columns["trak_features"] = (features.double() / scale.unsqueeze(1)).half().numpy()
        columns["trak_scale"] = scale.float().numpy()
    columns["trak_out_to_loss"] = out_to_loss.float().numpy()
    columns["trak_output"] = output.float().numpy()
    columns["trak_grad_norm"] = torch.linalg.vector_norm(features.double(), dim=1).float().numpy()
    return columns


def to_table(columns: Mapping[str, np.ndarray], origin: Origin | None = None) -> pa.Table:
    """Return an Arrow table. A matrix becomes a column of fixed-size lists. The `origin` of a shard is stored in the metadata."""
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(arrays, metadata=None if origin is None else write_origin(origin))


def join_columns(table: pa.Table, others: pa.Table) -> pa.Table:
    """Return a table with the columns of both tables and the metadata of both."""
    for field, column in zip(others.schema, others.columns, strict=True):
        table = table.append_column(field, column)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **(others.schema.metadata or {})} or None)


def check_example_ids(path: Path, example_id: Int64[Tensor, " rows"], first_row: int) -> None:
    """Check that rows have the numbers of their position in the training set.

    Raises:
        ValueError: Naming the first wrong row.
    """
    wrong = (example_id != torch.arange(first_row, first_row + len(example_id))).nonzero()
    if len(wrong):
        place = int(wrong[0])
        reason = f"its example_id is {int(example_id[place])} where row {first_row + place} belongs"
        raise DamagedFile(
            f"{path} is damaged: {reason}. Restore it from a copy, or delete it and run the command that made the index again: only missing "
            "files are made again.",
            reason=reason,
        )


def check_place(path: Path, origin: Origin) -> None:
    """Check that a shard and its rows belong where they are, without reading features.

    Raises:
        ValueError: Saying where the shard belongs.
    """
    try:
        table = pq.read_table(path, columns=["example_id"])
        refuse_other_origin(path, read_origin(table.schema.metadata), origin)
        example_id = _tensor(table, "example_id")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error
    check_example_ids(path, example_id, origin.first_row)


def check_shard(path: Path, origin: Origin, *, n_rows: int) -> None:
    """Check a shard completely: its origin, the checksum of every page, its row numbers, and that all numbers are finite.

    Raises:
        ValueError, KeyError, OSError, pa.ArrowException: Saying what is wrong.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        refuse_other_origin(path, read_origin(file.schema_arrow.metadata), origin)
        if file.metadata.num_rows != n_rows:
            raise ValueError(f"it has {file.metadata.num_rows:,} rows, where {n_rows:,} were written")
        row = origin.first_row
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            check_example_ids(path, _tensor(table, "example_id"), row)
            row += len(table)
            for name in ("trak_features", "trak_out_to_loss", "trak_output"):
                column = table.column(name).combine_chunks()
                flat = column.flatten() if name == "trak_features" else column
                if not pc.all(pc.is_finite(flat.cast(pa.float32()))).as_py():
                    raise ValueError(f"{name} of rows {row - len(table)} to {row - 1} holds numbers that are not finite")


def read_shard(path: Path, origin: Origin | None = None) -> Shard:
    """Read one Parquet shard, checking the checksum of every page.

    Args:
        origin ([`Origin`], *optional*): Where the shard belongs. A file with another origin is refused.

    Raises:
        ValueError: If the file is damaged, or belongs elsewhere.
    """
    try:
        if origin is not None:
            refuse_other_origin(path, read_origin(pq.read_schema(path).metadata), origin)
        stored = pq.read_schema(path).names
        # Skip kept columns of the training set, which may be images.
        names = [name for name in _READ if name in stored]
        table = pq.read_table(path, columns=names, page_checksum_verification=True)
        length = table.schema.field("trak_features").type.list_size
        flat = table.column("trak_features").combine_chunks()
        features = torch.from_numpy(np.array(flat.flatten().to_numpy(zero_copy_only=False))).reshape(-1, length)
        if "trak_scale" in table.column_names:
            features = features.float() * _tensor(table, "trak_scale").unsqueeze(1)
        shard = Shard(_tensor(table, "example_id"), features, _tensor(table, "trak_out_to_loss"), _tensor(table, "trak_output"))
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error
    if origin is not None:
        check_example_ids(path, shard.example_id, origin.first_row)
    return shard


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.array(table.column(name).to_numpy()))
