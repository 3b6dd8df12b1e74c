r"""The kernel of a member: float64 sums over stretches of shards, and the sum of these, both in shard order.

Where the stretches lie depends on the number of shards alone, so that however many processes add them up, the bytes are the same.
Up to 64 shards are one stretch: their kernel is the plain sum in shard order.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save
from torch import Tensor

from hf_trak.linalg import accumulate_kernel
from hf_trak.storage.files import write_atomically
from hf_trak.storage.member_writer import MemberWriter
from hf_trak.storage.object_store import local_copy

_SHARDS = 64  # of a stretch at least
_STRETCHES = 64  # at most: each that is kept takes proj_dim² · 8 bytes until the member is finished


def stretches(n_shards: int) -> list[range]:
    """Return which shards are summed together."""
    size = max(_SHARDS, math.ceil(n_shards / _STRETCHES))
    return [range(first, min(first + size, n_shards)) for first in range(0, n_shards, size)]


def kernel_of(writer: MemberWriter, *, proj_dim: int) -> Float64[Tensor, "proj_dim proj_dim"]:
    """Return the kernel of a member whose shards are all written; stretches that were kept are read, not summed again."""
    kernel = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for stretch in stretches(writer.n_shards):
        path = _path(writer, stretch)
        kernel += _read(path) if path.exists() else _sum(writer, stretch, proj_dim)
    return kernel


def keep_stretch(writer: MemberWriter, stretch: range, *, proj_dim: int) -> None:
    """Sum one stretch of shards and keep the result beside the records of an unfinished member, unless it is there."""
    path = _path(writer, stretch)
    if not path.exists():
        kernel = _sum(writer, stretch, proj_dim)
        write_atomically(path, lambda temporary: temporary.write_bytes(save({"kernel": kernel})))


def _read(path: Path) -> Float64[Tensor, "proj_dim proj_dim"]:
    with local_copy(path) as file:
        return load_file(file)["kernel"]


def _sum(writer: MemberWriter, stretch: range, proj_dim: int) -> Float64[Tensor, "proj_dim proj_dim"]:
    kernel = torch.zeros(proj_dim, proj_dim, dtype=torch.float64)
    for shard in stretch:
        accumulate_kernel(kernel, writer.read(shard).features)
    return kernel


def _path(writer: MemberWriter, stretch: range) -> Path:
    return writer.progress / f"kernel-{stretch.start:05d}.safetensors"
