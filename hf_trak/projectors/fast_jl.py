"""fast_jl: the reference implementation's CUDA kernel for dense random signs. Optional.

The kernel cuts a gradient into as many tiles as the GPU has multiprocessors, and seeds the signs of each tile by its number. So features
from two GPU models cannot be compared. An index records the GPU model.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import stream_key
from hf_trak.projectors.base import Projector

_COLUMNS = 512  # the kernel computes this many numbers at a time
_BATCHES = (8, 16, 32)  # batch sizes that the kernel accepts
_CAPABILITY = (7, 0)  # the first with the half-precision matrix units that the kernel uses
_ENTRIES = 1 << 28  # gradient entries in memory at once: 1 GiB in float32
_ADDRESSES = 1 << 32  # entries the kernel can count


class FastJL(Projector):
    r"""Entries ±1/√proj_dim, independent, drawn inside a CUDA kernel.

    Source: `fast_jl`, from [MadryLab/trak](https://github.com/MadryLab/trak). How to install it: docs/reference/fast_jl.md.

    Raises:
        ValueError: If `proj_dim` is not a multiple of 512, or there is no CUDA device that can run it.
        ImportError: If `fast_jl` is not installed.
    """

    def __init__(self, *, proj_dim: int, seed: int) -> None:
        super().__init__(proj_dim=proj_dim, seed=seed)
        if proj_dim % _COLUMNS:
            below = proj_dim // _COLUMNS * _COLUMNS
            near = f"{below} or {below + _COLUMNS}" if below else f"{_COLUMNS}"
            raise ValueError(f"fast_jl needs a proj_dim that is a multiple of {_COLUMNS}, but it is {proj_dim}; try {near}.")
        load_fast_jl()

    def tied_to(self, device: torch.device) -> str:
        """Return the GPU model of `device`. Features can only be compared with those of the same model.

        Raises:
            ValueError: If `device` is not a CUDA device, or is too old.
        """
        if device.type != "cuda":
            raise ValueError(
                f"fast_jl runs only on CUDA devices, but the device is {device}. Use a machine with a GPU, or "
                "projector='block_count_sketch', which runs anywhere."
            )
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            raise ValueError(
                f"fast_jl needs compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, but {name} has "
                f"{capability[0]}.{capability[1]}. Use a newer GPU, or projector='block_count_sketch'."
            )
        return name

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        flat = grads.reshape(grads.shape[0], -1)
        for group in self._groups(name, *flat.shape):
            accumulator[group] += self._project(name, flat[group]).to(accumulator.dtype)

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for group in self._groups(name, left.shape[0], left.shape[2] * right.shape[2]):
            super().add_outer(accumulator[group], name, left[group], right[group])

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for group in self._groups(name, values.shape[0], math.prod(shape)):
            super().add_rows(accumulator[group], name, shape, rows[group], values[group])

    def _groups(self, name: str, n_rows: int, n_entries: int) -> list[slice]:
        """Cut a batch into groups that the kernel accepts and whose complete gradients fit in memory."""
        if _BATCHES[0] * n_entries >= _ADDRESSES:
            raise ValueError(
                f"{name} has {n_entries:,} entries, but fast_jl supports at most {_ADDRESSES // _BATCHES[0]:,}. Leave it out with "
                "`parameters`, or use projector='block_count_sketch'."
            )
        size = max((size for size in _BATCHES if size * n_entries <= _ENTRIES), default=_BATCHES[0])
        return [slice(start, start + size) for start in range(0, n_rows, size)]

    def _project(self, name: str, grads: Float[Tensor, "rows entries"]) -> Float[Tensor, "rows proj_dim"]:
        # Differs from the reference: the kernel rounds entries to float16, in which those below 6e-8 vanish and those above 65,504
        # overflow; rows are first scaled to at most 1 by a power of two. Each parameter is sketched separately with its own
        # seed, not as a part of one long vector.
        largest = grads.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.exp2(largest.log2().ceil())
        size = next(size for size in _BATCHES if size >= len(grads))
        padded = grads.new_zeros(size, grads.shape[1], dtype=torch.float32)
        padded[: len(grads)] = grads / scale
        seed = stream_key(self.seed, name, "fast_jl") % (1 << 31)
        multiprocessors = torch.cuda.get_device_properties(grads.device).multi_processor_count
        signed = getattr(load_fast_jl(), f"project_rademacher_{size}")(padded, self.proj_dim, seed, multiprocessors)
        return signed[: len(grads)] * scale / math.sqrt(self.proj_dim)


def load_fast_jl() -> ModuleType:
    """Import the extension.

    Raises:
        ImportError: If it is not installed. The message says how to install it.
    """
    try:
        import fast_jl
    except ImportError as error:
        raise ImportError(
            f"projector='fast_jl' needs the CUDA extension fast_jl, which cannot be imported ({error}). With torch for CUDA and "
            "nvcc in place: pip install --no-build-isolation fast_jl. Or use projector='block_count_sketch', which needs nothing."
        ) from error
    return fast_jl
