"""Counter-based hashing for sketches, and content hashes for files, weights and configurations.

Random numbers depend only on (key, counter). They are computed in 64-bit integer arithmetic, which wraps in the same way on every device.
So features from different machines can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# The 64-bit golden-ratio increment and the two multipliers of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), as signed integers.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def stream_key(*parts: str | int) -> int:
    """Return a signed 64-bit key for the random stream named by `parts`; different names give unrelated streams."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _shift_right(value: Int64[Tensor, "..."], bits: int) -> Int64[Tensor, "..."]:
    """Shift without copying the sign bit: torch has no unsigned 64-bit shift on every device."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key: int, counter: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Return 64 random bits per entry of `counter`: the `counter`-th output of SplitMix64 seeded with `key`.

    Args:
        key (`int`): From [`stream_key`].
        counter (`torch.Tensor`): Any shape, int64; the result is on its device.
    """
    state = counter * _INCREMENT + key
    state = (state ^ _shift_right(state, 30)) * _MULTIPLIERS[0]
    state = (state ^ _shift_right(state, 27)) * _MULTIPLIERS[1]
    return state ^ _shift_right(state, 31)


def random_signs(key: int, count: int) -> Float32[Tensor, " count"]:
    """Return `count` independent signs ±1, on the CPU."""
    return 1.0 - 2.0 * _shift_right(random_bits(key, torch.arange(count)), 63).float()


def random_integers(key: int, count: int, *, below: int, start: int = 0) -> Int64[Tensor, " count"]:
    """Return numbers `start` to `start + count` of a stream uniform on `[0, below)`, on the CPU.

    The bias of the remainder is under `below / 2**62`.
    """
    return _shift_right(random_bits(key, torch.arange(start, start + count)), 2) % below


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes, in the mapping's order. Shared storage is hashed once per name."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_of(dataset: Any) -> str:
    """Return the fingerprint of a `datasets.Dataset`: a hash of its content and of what was done to it."""
    return dataset._fingerprint  # it has no public name


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
