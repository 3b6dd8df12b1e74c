"""Triton kernels for CUDA: additions around a ring. Each bucket belongs to one program, so every run gives the same bits.

Imported only if a CUDA device and Triton are available. Plain tensor operations in `count_sketch.py` compute the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

_BLOCK = 1024  # buckets of one program


@triton.jit
def _add_stream(  # type: ignore[no-untyped-def]
    target, target_stride, entries, entries_stride, signs, n_entries, ring, start, SIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """target[b, (start + k) mod ring] += signs[k] entries[b, k], for one example and one block of buckets."""
    example = tl.program_id(0).to(tl.int64)
    bucket = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = bucket < ring
    first = tl.where(bucket >= start, bucket - start, bucket - start + ring)
    total = tl.load(target + example * target_stride + bucket, mask=inside, other=0.0)
    for lap in range(0, n_entries, ring):
        entry = first + lap
        mask = inside & (entry < n_entries)
        value = tl.load(entries + example * entries_stride + entry, mask=mask, other=0.0)
        if SIGNED:
            value *= tl.load(signs + entry, mask=mask, other=0.0)
        total += value
    tl.store(target + example * target_stride + bucket, total, mask=inside)


@triton.jit
def _add_rows(  # type: ignore[no-untyped-def]
    accumulator, accumulator_stride, values, first, ring, offset, n_tokens, width, length, BLOCK: tl.constexpr
):
    """accumulator[b, offset + (first + c) mod ring] += values[b, t, c] for every token t, in the order of tokens."""
    example = tl.program_id(0).to(tl.int64)
    bucket = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = bucket < length
    total = tl.load(accumulator + example * accumulator_stride + bucket, mask=inside, other=0.0)
    for token in range(n_tokens):
        here = example * n_tokens + token
        place = bucket - tl.load(offset + here)
        laps = tl.load(ring + here)
        column = place - tl.load(first + here)
        column = tl.where(column < 0, column + laps, column)
        mask = inside & (place >= 0) & (place < laps) & (column < width)
        total += tl.load(values + here * width + column, mask=mask, other=0.0)
    tl.store(accumulator + example * accumulator_stride + bucket, total, mask=inside)


def add_stream(
    target: Float[Tensor, "batch ring"],
    entries: Float[Tensor, "batch entries"],
    *,
    start: int,
    signs: Float[Tensor, " entries"] | None = None,
) -> None:
    """Add consecutive entries around the ring, starting at bucket `start`; `target` may be a slice of a wider tensor."""
    entries = entries.contiguous()
    batch_size, ring = target.shape
    _add_stream[(batch_size, triton.cdiv(ring, _BLOCK))](
        target,
        target.stride(0),
        entries,
        entries.stride(0),
        entries if signs is None else signs,
        entries.shape[1],
        ring,
        start,
        SIGNED=signs is not None,
        BLOCK=_BLOCK,
    )


def add_rows(
    accumulator: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch tokens width"],
    *,
    first: Int64[Tensor, "batch tokens"],
    ring: Int64[Tensor, "batch tokens"],
    offset: Int64[Tensor, "batch tokens"],
) -> None:
    """Add each token's row to its own ring, starting at position `first`; the ring begins at `offset` of the accumulator."""
    batch_size, n_tokens, width = values.shape
    length = accumulator.shape[1]
    _add_rows[(batch_size, triton.cdiv(length, _BLOCK))](
        accumulator,
        accumulator.stride(0),
        values.contiguous(),
        first.contiguous(),
        ring.contiguous(),
        offset.contiguous(),
        n_tokens,
        width,
        length,
        BLOCK=_BLOCK,
    )
