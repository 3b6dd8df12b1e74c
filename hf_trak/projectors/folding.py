"""Folding: one axis of a weight, hashed to fewer entries before an outer product is formed.

An axis is cut into blocks of `n_buckets` entries; every entry gets a sign, every block a rotation, and the blocks are added. That
is an unbiased sketch of the axis at the price of reading it once, with contiguous additions and no gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import random_integers, random_signs, stream_key

# A weight of fewer entries than this costs nothing to speak of; folding it would only add noise.
_SMALL = 1 << 16


def folded_shape(rows: int, columns: int, *, fold: int) -> tuple[int, int]:
    """Return the shape of a (rows, columns) weight whose longer side is folded.

    It is folded at most `fold` times over, to no fewer entries than the shorter side has, and never so far that the weight
    becomes small. So a square matrix stays as it is, a feed-forward layer's becomes square, and an embedding table of any size
    keeps thousands of rows.
    """
    longer, shorter = max(rows, columns), min(rows, columns)
    kept = min(longer, max(shorter, math.ceil(longer / fold), math.ceil(_SMALL / shorter)))
    return (kept, columns) if rows >= columns else (rows, kept)


@dataclass(frozen=True)
class Fold:
    """A signed fold of one axis.

    Args:
        signs (`torch.Tensor`): One per entry of the axis.
        n_buckets (`int`): Entries after folding; as many as there are signs if the axis is not folded.
        rotations (`tuple[int, ...]`): One per block of `n_buckets` entries; 0 if there is one block.
    """

    signs: Float[Tensor, " length"]
    n_buckets: int
    rotations: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, name: str, axis: str, *, length: int, n_buckets: int, device: torch.device, tile: int = 0) -> Fold:
        """Draw the fold of one axis of parameter `name`; `tile` tells apart folds of the same axis."""
        n_blocks = math.ceil(length / n_buckets)
        rotations = [0]
        if n_blocks > 1:
            rotations = random_integers(stream_key(seed, name, axis, "fold", tile), n_blocks, below=n_buckets).tolist()
        return cls(random_signs(stream_key(seed, name, axis, tile), length).to(device), n_buckets, tuple(rotations))

    @property
    def is_folded(self) -> bool:
        """Whether entries share buckets."""
        return self.n_buckets < len(self.signs)

    @cached_property
    def buckets(self) -> Int64[Tensor, " length"]:
        """The bucket of every entry."""
        position = torch.arange(len(self.signs), device=self.signs.device)
        rotations = torch.tensor(self.rotations, device=self.signs.device)
        return (position + rotations[position // self.n_buckets]) % self.n_buckets

    def __call__(self, values: Float[Tensor, "*shape"], *, dim: int = -1) -> Float[Tensor, "*folded"]:
        """Fold one axis of `values`, by default the last."""
        signs = self.signs.to(values).reshape(-1, *[1] * (-1 - dim))
        if not self.is_folded:
            return values * signs
        shape = list(values.shape)
        shape[dim] = self.n_buckets
        result = values.new_zeros(shape)
        for block, rotation in enumerate(self.rotations):
            start = block * self.n_buckets
            stop = min(start + self.n_buckets, len(signs))
            turn = min(start + self.n_buckets - rotation, stop)  # where the rotated block runs over the end
            for first, end, to in ((start, turn, rotation), (turn, stop, 0)):
                place = result.narrow(dim, to, end - first)
                place.addcmul_(values.narrow(dim, first, end - first), signs[first:end])
        return result
