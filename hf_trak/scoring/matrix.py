"""Score matrices, (n_train, n_query): in memory where they fit, else mapped to a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from hf_trak.scoring.thresholds import soft_threshold
from hf_trak.storage.outputs import reserve

_IN_MEMORY_BYTES = 1 << 30  # larger matrices are memory-mapped


def allocate(shape: tuple[int, int], *, at_most: int = _IN_MEMORY_BYTES) -> np.ndarray:
    """Return a float32 matrix to be filled; above 1 GiB, or above `at_most` bytes, one that is mapped to a temporary file, which
    vanishes with the array.

    Raises:
        OSError: If the disk of temporary files has no room.
    """
    n_bytes = 4 * shape[0] * shape[1]
    if n_bytes <= min(at_most, _IN_MEMORY_BYTES):
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        reserve(file.fileno(), n_bytes, Path(tempfile.gettempdir()) / "scores")  # a map of a full disk ends the process
        return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


def npy_bytes(shape: tuple[int, int]) -> int:
    """Return how large a `.npy` file of a float32 matrix is at most."""
    return 4 * shape[0] * shape[1] + 4096


def map_npy(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Make an existing file the `.npy` file of a float32 matrix, and map it; the room it has stays reserved."""
    with open(file, "r+b") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "<f4", "fortran_order": False, "shape": shape})
        opened.truncate(opened.tell() + 4 * shape[0] * shape[1])
    return np.load(file, mmap_mode="r+")


def check_keep(keep: int | None) -> None:
    """Refuse a number of scores per query that would leave none."""
    if keep is not None and keep < 1:
        raise ValueError(f"`soft_threshold` is the number of scores per query to keep, at least 1, but is {keep}.")


def soft_threshold_in_place(scores: np.ndarray, keep: int, *, at_most: int = _IN_MEMORY_BYTES) -> None:
    """Soft-threshold some queries at a time, so that a memory-mapped matrix is never whole in memory."""
    at_once = max(1, min(at_most, _IN_MEMORY_BYTES) // (16 * max(1, len(scores))))  # scores, sizes, signs and the result
    for start in range(0, scores.shape[1], at_once):
        columns = torch.from_numpy(np.array(scores[:, start : start + at_once]))
        scores[:, start : start + at_once] = soft_threshold(columns, keep).numpy()
