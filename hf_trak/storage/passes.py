"""One pass of gradients that computes several members: its columns and files, and the float64 sums of their Gram matrices.

A stretch is a range of consecutive shards that are summed together. Stretches depend only on the number of shards, so the bytes do not
depend on the number of processes. Up to 64 shards are one stretch, whose Gram matrix is the sum in the order of the shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float64
from safetensors.torch import load_file, save
from torch import Tensor

from hf_trak.linalg import accumulate_gram
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.files import write_atomically
from hf_trak.storage.object_store import local_copy
from hf_trak.storage.writer import MemberWriter

_SHARDS = 64  # minimum length of a stretch
_STRETCHES = 64  # maximum number: each stored sum takes proj_dim² · 8 bytes until the member is finished


def stretches(n_shards: int) -> list[range]:
    """Return the ranges of shards that are summed together."""
    size = max(_SHARDS, math.ceil(n_shards / _STRETCHES))
    return [range(first, min(first + size, n_shards)) for first in range(0, n_shards, size)]


def gram_of(writer: MemberWriter, *, proj_dim: int) -> Float64[Tensor, "proj_dim proj_dim"]:
    """Return the Gram matrix of a member whose shards are all written. Stored sums of stretches are read, not computed again."""
    gram = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for stretch in stretches(writer.n_shards):
        path = _path(writer, stretch)
        gram += _read(path) if path.exists() else _sum(writer, stretch, proj_dim)
    return gram


def keep_stretch(writer: MemberWriter, stretch: range, *, proj_dim: int) -> None:
    """Sum one stretch of shards and store the result in `.progress` of an unfinished member, unless it exists."""
    path = _path(writer, stretch)
    if not path.exists():
        gram = _sum(writer, stretch, proj_dim)
        write_atomically(path, lambda temporary: temporary.write_bytes(save({"gram": gram})))


def _read(path: Path) -> Float64[Tensor, "proj_dim proj_dim"]:
    with local_copy(path) as file:
        return load_file(file)["gram"]


def _sum(writer: MemberWriter, stretch: range, proj_dim: int) -> Float64[Tensor, "proj_dim proj_dim"]:
    gram = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for shard in stretch:
        accumulate_gram(gram, writer.read(shard).features)
    return gram


def _path(writer: MemberWriter, stretch: range) -> Path:
    return writer.progress / f"gram-{stretch.start:05d}.safetensors"


def encode_pass(
    features: Float[Tensor, "rows width"],
    output: Float[Tensor, " rows"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    seeds: Sequence[int],
    dtype: str,
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of every sketch. With several sketches, the names of columns end in the sketch's seed."""
    columns: dict[str, np.ndarray] = {}
    for seed, part in zip(seeds, features.chunk(len(seeds), dim=1), strict=True):
        for name, values in encode_columns(part, output, out_to_loss, dtype=dtype).items():
            columns[_name(name, seed, seeds)] = values
    return columns


def columns_of(columns: Mapping[str, np.ndarray], seed: int, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the columns of one sketch from those of [`encode_pass`], with their plain names."""
    if len(seeds) == 1:
        return dict(columns)
    ending = _name("", seed, seeds)
    return {name.removesuffix(ending): values for name, values in columns.items() if name.endswith(ending)}


def _name(name: str, seed: int, seeds: Sequence[int]) -> str:
    return name if len(seeds) == 1 else f"{name}_seed_{seed}"


class PassWriter:
    """Writes the shards of one pass to the folders of several members, with the interface of a [`MemberWriter`].

    A shard is missing if any member lacks it. It is written only for the members that lack it, so members that are finished or further
    along do not change.

    Args:
        writers (`Sequence[MemberWriter]`): The writers of the members, with the same shards.
        seeds (`Sequence[int]`): Their sketch seeds.
    """

    def __init__(self, writers: Sequence[MemberWriter], seeds: Sequence[int]) -> None:
        self.writers = list(writers)
        self.seeds = list(seeds)
        self.n_rows = self.writers[0].n_rows
        self.shard_rows = self.writers[0].shard_rows
        self.n_shards = self.writers[0].n_shards

    def rows(self, shard: int) -> range:
        """Return the dataset's rows that belong to a shard."""
        return self.writers[0].rows(shard)

    def missing(self) -> list[int]:
        """Return the shards that some member lacks."""
        return sorted({shard for writer in self.writers for shard in writer.missing()})

    def write(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write a shard for every member that lacks it."""
        for writer, seed in zip(self.writers, self.seeds, strict=True):
            if writer.lacks(shard):
                writer.write(shard, columns_of(columns, seed, self.seeds))
