"""Reading a finished member: its shards or row groups, and its Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_trak.hashing import hash_file
from hf_trak.storage.columns import Shard, check_example_ids, read_shard
from hf_trak.storage.files import file_size
from hf_trak.storage.format import (
    GRAM_NAME,
    MASK_NAME,
    MEMBER_NAME,
    PROGRESS,
    Origin,
    origin_of,
    read_member_info,
    read_origin,
    refuse_other_origin,
)
from hf_trak.storage.verify import is_as_written

_CHANGED = f"has changed since it was written: its SHA-256 differs from the one in {MEMBER_NAME}"
_MEND = "Restore it from a copy, or run the command that made the index again: only files that are missing or damaged are made again."


@dataclass(eq=False)
class InMemory:
    """A member in memory: its row groups by shard, its Gram matrix, and the last factor with its parameters."""

    blocks: list[list[Shard]]
    gram: Float64[Tensor, "proj_dim proj_dim"]
    factors: dict[tuple[float, bool], Float64[Tensor, "proj_dim proj_dim"]] = field(default_factory=dict)


class MemberReader:
    """A finished member.

    Args:
        folder (`Path`): The member's folder.
        fetch (*optional*): Called with the name of a file before its first use, to download it into `folder`. By default, all files
            must exist.

    Files are hashed before use: shards and downloaded files on their first use, the others in the constructor.

    Raises:
        FileNotFoundError: If the folder is not a finished member.
        ValueError: If a file is missing or has changed since it was written. For existing shards, only the size is checked here.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], Any] | None = None) -> None:
        self.folder = folder
        if not (folder / MEMBER_NAME).exists():
            begun = (folder / PROGRESS).exists()
            raise FileNotFoundError(
                f"{folder} is unfinished; run the command that began it again to continue."
                if begun
                else f"{folder} holds no {MEMBER_NAME}, so it is not a member of an attribution index."
            )
        self.info = read_member_info(folder)
        self.identity: dict[str, Any] = self.info["identity"]
        self.records: dict[str, dict[str, Any]] = {entry["file"]: entry for entry in self.info["files"]}
        self._fetch = fetch
        self._verified: set[str] = set()
        self.in_memory: InMemory | None = None
        self.shard_paths: Sequence[Path] = _ShardPaths(self)
        if fetch is None:
            for name in self.records:
                self._check_size(name)
            for name, record in self.records.items():
                if "rows" not in record:
                    self.path(name)

    def _check_size(self, name: str) -> None:
        path, expected = self.folder / name, self.records[name]["bytes"]
        size = file_size(path)
        if size != expected:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(self._what_it_is(path, f"{state}, where {expected:,} bytes were written"))

    def path(self, name: str) -> Path:
        """Return the path of a file. The file is downloaded if necessary, and checked against its recorded hash.

        Raises:
            ValueError: If the hash differs. A downloaded file is then deleted.
        """
        path = self.folder / name
        if name in self._verified:
            return path
        if self._fetch is not None:
            self._fetch(name)
        if not is_as_written(path, self.records[name]):
            if self._fetch is None:
                raise ValueError(self._what_it_is(path, _CHANGED))
            for damaged in (path.resolve(), path):  # in a cache, a link and its target
                damaged.unlink(missing_ok=True)
            raise ValueError(
                f"{path} is not what was written: its SHA-256 differs from the one in {MEMBER_NAME}. It was deleted, and the next "
                "call downloads it again. If the error remains, the file is damaged at its source: ask for it to be pushed again."
            )
        self._verified.add(name)
        return path

    def hash_shards(self, most_bytes: int) -> int:
        """Hash local shards in order, up to a total of `most_bytes`, and return the number of bytes left of it.

        Raises:
            ValueError: If a hash differs.
        """
        for name, record in self.records.items():
            if self._fetch is None and "rows" in record and record["bytes"] <= most_bytes:
                self.path(name)
                most_bytes -= record["bytes"]
        return most_bytes

    def _what_it_is(self, path: Path, problem: str) -> str:
        """Return a message for a changed file: where it belongs, if its metadata says so; otherwise, the problem."""
        names = [name for name, record in self.records.items() if "rows" in record]
        if path.name in names:
            try:
                found = read_origin(pq.read_schema(path).metadata)
                refuse_other_origin(path, found, self.origin(names.index(path.name)))
            except (pa.ArrowException, OSError):
                pass  # it is damaged; the message about the hash says so
            except ValueError as error:
                return str(error)
        return f"{path} {problem}. {_MEND}"

    def origin(self, shard: int) -> Origin:
        """Return the origin that a shard must have."""
        return origin_of(self.folder, self.identity, shard, n_shards=len(self.shard_paths))

    @property
    def n_rows(self) -> int:
        return self.identity["n_rows"]

    def shards(self) -> Iterator[Shard]:
        """Yield the shards in order, one in memory at a time."""
        for number, path in enumerate(self.shard_paths):
            yield read_shard(path, self.origin(number))

    def gram(self) -> Float64[Tensor, "proj_dim proj_dim"]:
        """Return ΦᵀΦ. Do not modify it."""
        return self._read_tensor(GRAM_NAME) if self.in_memory is None else self.in_memory.gram

    def keep_in_memory(self) -> None:
        """Read features and Gram matrix once, and keep them in memory."""
        if self.in_memory is None:
            paths = self.shard_paths
            blocks = [list(read_blocks(path, self.origin(number))) for number, path in enumerate(paths)]
            self.in_memory = InMemory(blocks, self.gram())

    def mask(self) -> Bool[Tensor, " rows"] | None:
        """Return the mask of rows that the checkpoint was trained on; None if it is not recorded."""
        return self._read_tensor(MASK_NAME) if MASK_NAME in self.records else None

    def tensors(self, file: str) -> dict[str, Tensor] | None:
        """Return stored tensors on which every row depends: the bank of a contrastive task, or running statistics. None if the member
        has no such file.

        Raises:
            ValueError: If the file has changed since it was written.
        """
        return load_file(self.path(file)) if file in self.records else None

    def _read_tensor(self, name: str) -> Tensor:
        path = self.path(name)
        try:
            return load_file(path)[name.split(".")[0]]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}. {_MEND}") from error

    def verify(self) -> None:
        """Hash every file, without the cache of hashes.

        Raises:
            ValueError: Naming the first file that has changed since it was written.
        """
        for name, record in self.records.items():
            if hash_file(self.path(name)) != record["sha256"]:
                raise ValueError(self._what_it_is(self.folder / name, _CHANGED))


class _ShardPaths(Sequence[Path]):
    """The paths of a member's shards in order. A shard is downloaded on access."""

    def __init__(self, member: MemberReader) -> None:
        self._member = member
        self._names = [name for name, record in member.records.items() if "rows" in record]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self._member.path(name) for name in self._names[index]]
        return self._member.path(self._names[index])


_COLUMNS = ("example_id", "trak_features", "trak_scale", "trak_out_to_loss", "trak_output")


class BlockSize(NamedTuple):
    """The size of a member's first row group. The others are no larger."""

    rows: int
    proj_dim: int
    bytes: int
    """Bytes on disk, and in Arrow's memory."""


def block_size(member: MemberReader) -> BlockSize:
    """Return the size of a member's row groups."""
    with pq.ParquetFile(member.shard_paths[0]) as file:
        group = file.metadata.row_group(0)
        length = file.schema_arrow.field("trak_features").type.list_size
        return BlockSize(group.num_rows, length, group.total_byte_size)


def member_blocks(member: MemberReader, shards: range | None = None) -> Iterator[Shard]:
    """Yield the row groups of all shards, or of `shards`, in order, one in memory at a time. Features are float32."""
    for number in range(len(member.shard_paths)) if shards is None else shards:
        if member.in_memory is not None:
            yield from member.in_memory.blocks[number]
        else:
            yield from read_blocks(member.shard_paths[number], member.origin(number))


def aligned_blocks(members: Sequence[MemberReader], shards: range | None = None) -> Iterator[tuple[Shard, ...]]:
    """Yield the same rows of every member. All members of an index have the same row groups."""
    return zip(*(member_blocks(member, shards) for member in members), strict=True)


def read_blocks(path: Path, origin: Origin | None = None) -> Iterator[Shard]:
    """Yield the row groups of one Parquet shard. The checksum of every page and the number of every row are checked.

    Args:
        origin ([`Origin`], *optional*): Where the shard belongs. A file with another origin is refused.

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
