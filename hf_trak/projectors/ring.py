"""Adding entries around a ring of buckets: the inner loop of the block count sketch."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import random_integers

_LAP = 1 << 15  # entries added by one operation: short rings are laid end to end until they are this long


class Ring(NamedTuple):
    """Buckets `offset` to `offset + length` of an accumulator."""

    length: int
    offset: int


def longest_side(proj_dim: int) -> int:
    """Return the rows or columns that may lie on one ring: fewer than any ring is long.

    From 149 on, the top sixteenth of the numbers up to proj_dim holds a prime, so it holds a ring; below, the top half does.
    """
    return proj_dim - proj_dim // 16 - 1 if proj_dim >= 149 else max(1, proj_dim // 2)


def draw_ring(key: int, width: int, *, proj_dim: int) -> Ring:
    """Draw a ring whose length is odd, at most proj_dim, above [`longest_side`], and shares no factor with `width`."""
    above = longest_side(proj_dim) if proj_dim > 2 else 0
    lengths = [length for length in range(above + 1, proj_dim + 1) if length % 2 and math.gcd(length, width) == 1]
    length = lengths[int(random_integers(key, 1, below=len(lengths)))]
    return Ring(length, int(random_integers(key, 1, below=proj_dim, start=1)))


class Laps:
    """Adds a stream of entries around a ring, in long contiguous pieces."""

    def __init__(self, accumulator: Float[Tensor, "batch width"], ring: Ring, n_entries: int) -> None:
        self.ring = ring
        self.target = accumulator[:, ring.offset : ring.offset + ring.length]
        n_rings = max(1, min(_LAP, n_entries // 4) // ring.length)  # a stream of few entries is not worth a longer ring
        self.lap = self.target if n_rings == 1 else accumulator.new_zeros(accumulator.shape[0], n_rings * ring.length)
        self.place = 0

    def add(self, entries: Float[Tensor, "batch entries"], signs: Float[Tensor, " entries"] | None = None) -> None:
        """Add entries from where the last ones ended, times `signs`."""
        length = self.lap.shape[1]
        done = 0
        while done < entries.shape[1]:
            piece = min(length - self.place, entries.shape[1] - done)
            target, values = self.lap[:, self.place : self.place + piece], entries[:, done : done + piece]
            if signs is None:
                target += values
            else:
                target.addcmul_(values, signs[done : done + piece])
            done += piece
            self.place = (self.place + piece) % length

    def close(self) -> None:
        """Bring what was added to the accumulator."""
        if self.lap is not self.target:
            self.target += self.lap.view(len(self.lap), -1, self.ring.length).sum(1)


class KernelLaps:
    """The same in one kernel per call, on CUDA."""

    def __init__(self, accumulator: Float[Tensor, "batch width"], ring: Ring, kernels: Any) -> None:
        self.ring = ring
        self.target = accumulator[:, ring.offset : ring.offset + ring.length]
        self.kernels = kernels
        self.place = 0

    def add(self, entries: Float[Tensor, "batch entries"], signs: Float[Tensor, " entries"] | None = None) -> None:
        """Add entries from where the last ones ended, times `signs`."""
        self.kernels.add_stream(self.target, entries, start=self.place, signs=signs)
        self.place = (self.place + entries.shape[1]) % self.ring.length

    def close(self) -> None:
        """Nothing is left to bring."""


def kernels_for(device: torch.device) -> Any:
    """Return the Triton kernels for a CUDA device where Triton is installed, else None."""
    return _load_kernels() if device.type == "cuda" else None


@cache
def _load_kernels() -> Any:
    if find_spec("triton") is None:
        return None
    from hf_trak.projectors import ring_kernels

    return ring_kernels


def laps_around(accumulator: Float[Tensor, "batch width"], ring: Ring, n_entries: int) -> Laps | KernelLaps:
    """Begin a stream of `n_entries` entries around `ring`."""
    kernels = kernels_for(accumulator.device)
    return Laps(accumulator, ring, n_entries) if kernels is None else KernelLaps(accumulator, ring, kernels)


def add_rows_around(
    accumulator: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch tokens width"],
    *,
    first: Int64[Tensor, "batch tokens"],
    ring: Int64[Tensor, "batch tokens"],
    offset: Int64[Tensor, "batch tokens"],
) -> None:
    """Add each token's row from place `first` on of a ring of its own, which begins at `offset` of the accumulator."""
    kernels = kernels_for(accumulator.device)
    if kernels is not None:
        kernels.add_rows(accumulator, values, first=first, ring=ring, offset=offset)
        return
    ring, place = ring.unsqueeze(-1), first.unsqueeze(-1) + torch.arange(values.shape[2], device=first.device)
    buckets = (torch.where(place < ring, place, place - ring) + offset.unsqueeze(-1)).flatten(1)
    if accumulator.device.type == "cpu":
        accumulator.scatter_add_(1, buckets, values.flatten(1))
    else:  # on CUDA, `scatter_add_` adds in an order that changes from run to run; this sorts first
        example = torch.arange(len(buckets), device=buckets.device).unsqueeze(1).expand_as(buckets)
        accumulator.index_put_((example, buckets), values.flatten(1), accumulate=True)
