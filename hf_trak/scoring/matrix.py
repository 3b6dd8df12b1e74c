"""Score matrices, (n_train, n_query): in memory where they fit, else mapped to a file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from hf_trak.scoring.thresholds import soft_threshold

_IN_MEMORY_BYTES = 1 << 30  # larger matrices are memory-mapped


def allocate(shape: tuple[int, int], output_file: str | Path | None, *, at_most: int = _IN_MEMORY_BYTES) -> np.ndarray:
    """Return a float32 matrix to be filled.

    Args:
        output_file (`str` or `Path`, *optional*): A `.npy` file to map it to. Without it, what is above 1 GiB, or above `at_most`
            bytes, is mapped to a temporary file that vanishes with the array.
    """
    if output_file is not None:
        return np.lib.format.open_memmap(output_file, mode="w+", dtype=np.float32, shape=shape)
    if 4 * shape[0] * shape[1] <= min(at_most, _IN_MEMORY_BYTES):
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


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
