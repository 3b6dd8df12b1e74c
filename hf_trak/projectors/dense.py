"""Reference projections: a dense matrix of random signs, and the identity."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import random_bits, stream_key
from hf_trak.projectors.base import Projector

_BITS = 32  # signs taken from one hash
_COLUMN_SPAN = 1 << 20  # hashes reserved for one position: its signs do not depend on proj_dim


class DenseRademacher(Projector):
    r"""Entries ±1/√proj_dim, independent. The reference for quality; its cost grows with proj_dim × parameters.

    Its variance is $(\|x\|^2\|y\|^2 + \langle x,y\rangle^2 - 2\sum_i x_i^2 y_i^2)/\text{proj\_dim}$.

    ```python
    >>> from hf_trak.projectors import DenseRademacher
    >>> projector = DenseRademacher(proj_dim=64, seed=0)
    >>> sketch = projector.start(2, dtype=torch.float32, device=torch.device("cpu"))
    >>> projector.add(sketch, "weight", torch.randn(2, 10, 20))
    >>> projector.finish(sketch).shape
    torch.Size([2, 64])
    ```

    Args:
        block_size (`int`): Number of parameter entries whose signs are in memory at once. It changes results only by round-off.
    """

    def __init__(self, *, proj_dim: int, seed: int, block_size: int = 4096) -> None:
        super().__init__(proj_dim=proj_dim, seed=seed)
        self.block_size = block_size

    def signs(self, name: str, positions: Int64[Tensor, " positions"]) -> Float[Tensor, "positions proj_dim"]:
        """Return the rows of √proj_dim · P for these positions of the flattened parameter `name`."""
        device = positions.device
        hashes = torch.arange(math.ceil(self.proj_dim / _BITS), device=device)
        bits = random_bits(stream_key(self.seed, name, "dense"), positions[:, None] * _COLUMN_SPAN + hashes)
        planes = (bits[:, :, None] >> torch.arange(_BITS, device=device)) & 1
        return (1 - 2 * planes.reshape(len(positions), -1)[:, : self.proj_dim]).float()

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        flat = grads.reshape(grads.shape[0], -1)
        for start in range(0, flat.shape[1], self.block_size):
            block = flat[:, start : start + self.block_size]
            positions = torch.arange(start, start + block.shape[1], device=flat.device)
            signs = self.signs(name, positions).to(block.dtype)
            accumulator.addmm_(block, signs, alpha=1 / math.sqrt(self.proj_dim))

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        # Only rows that occur in the batch have gradients, so only their signs are generated.
        columns = torch.arange(shape[1], device=rows.device)
        for row in rows.unique():
            grads = (values * (rows == row).unsqueeze(-1)).sum(1)
            signs = self.signs(name, row * shape[1] + columns).to(grads.dtype)
            accumulator.addmm_(grads, signs, alpha=1 / math.sqrt(self.proj_dim))


class Identity(Projector):
    """Concatenate the gradients of all parameters in the order in which they are declared; `proj_dim` must be their total size.

    ```python
    >>> from hf_trak.projectors import Identity
    >>> projector = Identity(proj_dim=200, seed=0)
    >>> projector.lay_out({"weight": 200})
    >>> sketch = projector.start(2, dtype=torch.float32, device=torch.device("cpu"))
    >>> projector.add(sketch, "weight", torch.ones(2, 10, 20))
    >>> sketch.sum(1)
    tensor([200., 200.])
    ```

    Args:
        sizes (`dict[str, int]`): Entries of each parameter, in order. Without it, [`Identity.lay_out`] must be called first.
    """

    def __init__(self, *, proj_dim: int, seed: int = 0, sizes: dict[str, int] | None = None) -> None:
        super().__init__(proj_dim=proj_dim, seed=seed)
        self.offsets: dict[str, int] = {}
        if sizes is not None:
            self.lay_out(sizes)

    def lay_out(self, sizes: dict[str, int]) -> None:
        """Declare the parameters.

        Raises:
            ValueError: If `proj_dim` is not their total size.
        """
        offset = 0
        for name, size in sizes.items():
            self.offsets[name] = offset
            offset += size
        if offset != self.proj_dim:
            raise ValueError(
                f"The identity projector keeps all {offset:,} gradient entries, but proj_dim is {self.proj_dim:,}; set "
                f"proj_dim={offset} or choose another projector."
            )

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        flat = grads.reshape(grads.shape[0], -1)
        accumulator[:, self.offsets[name] : self.offsets[name] + flat.shape[1]] += flat
