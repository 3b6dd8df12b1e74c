r"""The block count sketch: every gradient entry gets a sign and is added to one of proj_dim buckets.

A parameter is a matrix, cut into tiles. In a tile, entry (o, i) has

    sign   σ(o) τ(i)                     one hashed sign per row, one per column
    bucket (h(o) + i) mod proj_dim       a rotation per row; rows are laid end to end in blocks, one hashed rotation a block

Signs that factor over rows and columns are applied to the *factors* of an outer product, before it is formed, so that a Linear
layer's sketch costs its outer products and one contiguous, memory-bound pass of additions. No state per entry is kept.

**Why it is as good as dense signs.** The error of ⟨φ(x), φ(y)⟩ is the sum of σσ'ττ' x y' over entries that share a bucket. Within
a tile the rotations h are all different and a row is no longer than the ring, so two entries that share a bucket differ in both
row and column. Then σ(o)σ(o')τ(i)τ(i') equals that of no other colliding pair (the opposite corners (o,i'), (o',i) could collide
only at h(o') − h(o) = proj_dim / 2, which is not drawn where the row is long enough to matter). Different tiles have signs of
their own. So the variance is what independent signs give: (‖x‖²‖y‖² + ⟨x,y⟩²) / proj_dim up to the chance of a collision, and
less where energy shares a row, a column or a block, whose entries never meet. A plain block count sketch, whose blocks ignore
rows, folds whole hot columns onto each other when proj_dim and the row length share a factor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import random_integers, random_signs, stream_key
from hf_trak.projectors.base import Projector, as_matrix

_CHUNK = 1 << 19  # gradient entries materialised at one time by `add_outer`: about what a core's cache holds


@dataclass(frozen=True)
class _TileColumn:
    """The tiles that share a range of columns, from the first row to the last."""

    columns: slice
    tile_rows: int  # rows of a tile; the last may have fewer
    block_rows: int  # rows of a block
    row_signs: Float[Tensor, " rows"]
    column_signs: Float[Tensor, "tiles columns"]
    block_rotations: list[list[int]]  # (tiles, blocks)
    row_rotations: Int64[Tensor, " rows"]


def _draw_rotations(key: int, n_blocks: int, *, proj_dim: int, row_length: int, block_rows: int) -> list[int]:
    """Draw one rotation per block so that no two rows of a tile have the same one, nor are half the ring apart."""
    banned = np.arange(1 - block_rows, block_rows) * row_length % proj_dim
    if 2 * row_length > proj_dim and proj_dim % 2 == 0:
        banned = np.concatenate([banned, (banned + proj_dim // 2) % proj_dim])
    free = np.ones(proj_dim, dtype=bool)
    rotations: list[int] = []
    for start in itertools.count(0, 2 * n_blocks):  # at most about half the ring is ever banned: one draw in two succeeds
        for rotation in random_integers(key, 2 * n_blocks, below=proj_dim, start=start).tolist():
            if free[rotation]:
                rotations.append(rotation)
                free[(rotation + banned) % proj_dim] = False
            if len(rotations) == n_blocks:
                return rotations
    raise AssertionError("unreachable")


def _add_blocks(
    accumulator: Float[Tensor, "batch width"],
    signed: Float[Tensor, "batch rows columns"],
    block_rows: int,
    rotations: list[int],
) -> None:
    """Add whole blocks of rows, signs applied, each at its rotation."""
    length = block_rows * signed.shape[2]
    flat = signed.reshape(signed.shape[0], -1)
    for block, rotation in zip(flat.split(length, dim=1), rotations, strict=False):
        accumulator[:, rotation : rotation + block.shape[1]] += block


class BlockCountSketch(Projector):
    """One signed bucket per gradient entry, laid out for contiguous memory. The default projector."""

    def __init__(self, *, proj_dim: int, seed: int) -> None:
        super().__init__(proj_dim=proj_dim, seed=seed)
        self._tile_columns = cache(self._make_tile_columns)

    def __getstate__(self) -> dict[str, int]:
        return {"proj_dim": self.proj_dim, "seed": self.seed}  # tables are drawn again where they are needed

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _make_tile_columns(self, name: str, shape: tuple[int, int], device: torch.device) -> list[_TileColumn]:
        """Cut a parameter into tiles of at most proj_dim columns and proj_dim // 4 rows."""
        n_rows, n_columns = shape
        row_length = math.ceil(n_columns / math.ceil(n_columns / self.proj_dim))
        n_tiles = math.ceil(n_rows / max(1, self.proj_dim // 4))
        tile_rows = math.ceil(n_rows / n_tiles)
        block_rows = self.proj_dim // row_length
        place = torch.arange(tile_rows) % block_rows * row_length
        result = []
        for left in range(0, n_columns, row_length):
            block_rotations = [
                _draw_rotations(
                    stream_key(self.seed, name, "rotations", top, left),
                    math.ceil(tile_rows / block_rows),
                    proj_dim=self.proj_dim,
                    row_length=row_length,
                    block_rows=block_rows,
                )
                for top in range(0, n_rows, tile_rows)
            ]
            row_rotations = (
                torch.tensor(block_rotations).repeat_interleave(block_rows, 1)[:, :tile_rows] + place
            ) % self.proj_dim
            column_signs = random_signs(stream_key(self.seed, name, "columns", left), n_tiles * row_length)
            width = min(row_length, n_columns - left)
            result.append(
                _TileColumn(
                    columns=slice(left, left + width),
                    tile_rows=tile_rows,
                    block_rows=block_rows,
                    row_signs=random_signs(stream_key(self.seed, name, "rows", left), n_rows).to(device),
                    column_signs=column_signs.view(n_tiles, row_length)[:, :width].to(device),
                    block_rotations=block_rotations,
                    row_rotations=row_rotations.flatten()[:n_rows].to(device),
                )
            )
        return result

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        # Twice the ring: a rotated block is then one slice, and `finish` folds the second half onto the first.
        return torch.zeros(batch_size, 2 * self.proj_dim, dtype=dtype, device=device)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        return accumulator[:, : self.proj_dim] + accumulator[:, self.proj_dim :]

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        shape = as_matrix(tuple(grads.shape[1:]))
        matrices = grads.reshape(grads.shape[0], *shape)
        for column in self._tile_columns(name, shape, grads.device):
            for tile, top in enumerate(range(0, shape[0], column.tile_rows)):
                signs = torch.outer(column.row_signs[top : top + column.tile_rows], column.column_signs[tile])
                signed = matrices[:, top : top + column.tile_rows, column.columns] * signs.to(grads)
                _add_blocks(accumulator, signed, column.block_rows, column.block_rotations[tile])

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        n_rows, n_columns = left.shape[2], right.shape[2]
        for column in self._tile_columns(name, (n_rows, n_columns), left.device):
            block_entries = left.shape[0] * column.block_rows * (column.columns.stop - column.columns.start)
            blocks = max(1, _CHUNK // block_entries)
            signed_left = (left * column.row_signs.to(left)).transpose(1, 2)
            for tile, top in enumerate(range(0, n_rows, column.tile_rows)):
                bottom = min(top + column.tile_rows, n_rows)
                signed_right = right[:, :, column.columns] * column.column_signs[tile].to(right)
                # (batch, tokens, rows), (batch, tokens, columns) -> (batch, rows, columns), some blocks of rows at a time
                for block, first in enumerate(range(top, bottom, blocks * column.block_rows)):
                    grads = torch.bmm(signed_left[:, first : min(first + blocks * column.block_rows, bottom)], signed_right)
                    _add_blocks(accumulator, grads, column.block_rows, column.block_rotations[tile][block * blocks :])

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for column in self._tile_columns(name, shape, values.device):
            # (batch, tokens), (batch, tokens, columns) -> buckets and signed values, (batch, tokens · columns)
            signs = column.row_signs[rows].unsqueeze(-1) * column.column_signs[rows // column.tile_rows]
            signed = values[:, :, column.columns] * signs.to(values)
            buckets = column.row_rotations[rows].unsqueeze(-1) + torch.arange(signed.shape[2], device=rows.device)
            accumulator.scatter_add_(1, buckets.flatten(1), signed.flatten(1))
