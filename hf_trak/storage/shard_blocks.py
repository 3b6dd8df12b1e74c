"""Members' rows a row group at a time: what streams when a training set is larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_trak.storage.columns import Shard, check_example_ids
from hf_trak.storage.member_reader import MemberReader
from hf_trak.storage.origins import Origin, read_origin, refuse_other_origin

_COLUMNS = ("example_id", "trak_features", "trak_scale", "trak_out_to_loss", "trak_output")


class BlockSize(NamedTuple):
    """The first row group of a member, which the others are no larger than."""

    rows: int
    proj_dim: int
    bytes: int
    """On disk, and as Arrow holds it."""


def block_size(member: MemberReader) -> BlockSize:
    """Return how large a member's blocks are."""
    with pq.ParquetFile(member.shard_paths[0]) as file:
        group = file.metadata.row_group(0)
        length = file.schema_arrow.field("trak_features").type.list_size
        return BlockSize(group.num_rows, length, group.total_byte_size)


def member_blocks(member: MemberReader, shards: range | None = None) -> Iterator[Shard]:
    """Yield the row groups of some shards, or of all, in order, one in memory at a time; features are float32."""
    for number in range(len(member.shard_paths)) if shards is None else shards:
        yield from read_blocks(member.shard_paths[number], member.origin(number))


def aligned_blocks(members: Sequence[MemberReader], shards: range | None = None) -> Iterator[tuple[Shard, ...]]:
    """Yield the same rows of every member; members of one index are cut alike."""
    return zip(*(member_blocks(member, shards) for member in members), strict=True)


def read_blocks(path: Path, origin: Origin | None = None) -> Iterator[Shard]:
    """Yield the row groups of one Parquet shard, checking the checksum of every page, and that each row is that of its place.

    Args:
        origin ([`Origin`], *optional*): Where the shard belongs; a file that says something else is refused.

    Raises:
        ValueError: If the file is damaged, or belongs elsewhere.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if origin is not None:
                refuse_other_origin(path, read_origin(file.schema_arrow.metadata), origin)
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            row = 0 if origin is None else origin.first_row
            for group in range(file.num_row_groups):
                block = _decode(file.read_row_group(group, columns=columns, use_threads=False))
                if origin is not None:
                    check_example_ids(path, block.example_id, row)
                row += len(block.example_id)
                yield block
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error


def _decode(table: pa.Table) -> Shard:
    length = table.schema.field("trak_features").type.list_size
    flat = table.column("trak_features").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    features = torch.from_numpy(flat.astype(np.float32)).reshape(-1, length)
    if "trak_scale" in table.column_names:
        features.mul_(_tensor(table, "trak_scale").unsqueeze(1))
    return Shard(_tensor(table, "example_id"), features, _tensor(table, "trak_out_to_loss"), _tensor(table, "trak_output"))


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.array(table.column(name).to_numpy()))
