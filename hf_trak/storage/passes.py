"""Columns and files of one pass of gradients that makes several members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hf_trak.storage.columns import encode_columns
from hf_trak.storage.member_writer import MemberWriter


def encode_pass(
    features: Float[Tensor, "rows width"],
    output: Float[Tensor, " rows"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    seeds: Sequence[int],
    dtype: str,
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of every sketch; with several, a column's name ends in the sketch's seed."""
    columns: dict[str, np.ndarray] = {}
    for seed, part in zip(seeds, features.chunk(len(seeds), dim=1), strict=True):
        for name, values in encode_columns(part, output, out_to_loss, dtype=dtype).items():
            columns[_name(name, seed, seeds)] = values
    return columns


def columns_of(columns: Mapping[str, np.ndarray], seed: int, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the columns of one sketch among those of [`encode_pass`], under their plain names."""
    if len(seeds) == 1:
        return dict(columns)
    ending = _name("", seed, seeds)
    return {name.removesuffix(ending): values for name, values in columns.items() if name.endswith(ending)}


def _name(name: str, seed: int, seeds: Sequence[int]) -> str:
    return name if len(seeds) == 1 else f"{name}_seed_{seed}"


class PassWriter:
    """Writes one pass's shards, each member's to its own folder; to the loop over shards it is one [`MemberWriter`].

    A shard is missing if any member lacks it, and only those that lack it are written: a member that was finished, or got further
    before the process was killed, is not touched.

    Args:
        writers (`Sequence[MemberWriter]`): Of the members, over the same grid of rows.
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
        """Write a shard of every member that lacks it."""
        for writer, seed in zip(self.writers, self.seeds, strict=True):
            if writer.lacks(shard):
                writer.write(shard, columns_of(columns, seed, self.seeds))
