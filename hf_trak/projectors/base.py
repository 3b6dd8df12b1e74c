"""The interface of projectors, and several projectors applied to the same gradients.

An entry of P depends only on (seed, parameter name, position in the parameter). Sketches are linear, so a gradient can be added in
pieces: by parameter, by use of a tied weight, or by token.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a parameter's shape as (rows, columns). Rows are the first axis, columns are all others; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


class Projector(abc.ABC):
    r"""An unbiased sketch: $\mathbb{E}\langle P^\top x, P^\top y\rangle = \langle x, y\rangle$ over seeds.

    Args:
        proj_dim (`int`): Numbers kept per example.
        seed (`int`): Sketches with different seeds are independent.
    """

    def __init__(self, *, proj_dim: int, seed: int) -> None:
        if proj_dim < 1:
            raise ValueError(f"`proj_dim` must be at least 1, but is {proj_dim}.")
        self.proj_dim = proj_dim
        self.seed = seed

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        """Return an empty accumulator for one batch."""
        return torch.zeros(batch_size, self.proj_dim, dtype=dtype, device=device)

    @abc.abstractmethod
    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        """Add the sketch of the complete gradients of parameter `name` to `accumulator`."""

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        """Add the sketch of gradients that are a sum over tokens of outer products of `left` (rows) and `right` (columns)."""
        self.add(accumulator, name, torch.bmm(left.transpose(1, 2), right))

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        """Add the sketch of gradients that are zero except for `values`, which are added at `rows` of a parameter of this `shape`."""
        grads = values.new_zeros(values.shape[0], *shape)
        grads.scatter_add_(1, rows.unsqueeze(-1).expand_as(values), values)
        self.add(accumulator, name, grads)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        """Return the features of a batch from its accumulator."""
        return accumulator


class StackedProjector(Projector):
    """Several projectors that share one wide accumulator, each with its own columns.

    The features are the features of the projectors, one after the other. They equal those of each projector alone.

    ```python
    >>> from hf_trak.projectors import make_projectors
    >>> projector = make_projectors("block_count_sketch", proj_dim=64, seeds=[0, 1])
    >>> type(projector).__name__
    'StackedProjector'
    ```

    Args:
        projectors (`Sequence[Projector]`): At least one.
    """

    def __init__(self, projectors: Sequence[Projector]) -> None:
        if not projectors:
            raise ValueError("A stack needs at least one projector, but there are none.")
        super().__init__(proj_dim=sum(projector.proj_dim for projector in projectors), seed=projectors[0].seed)
        self.projectors = list(projectors)
        # Each projector chooses the width of its accumulator.
        empty = [projector.start(0, dtype=torch.float32, device=torch.device("cpu")) for projector in projectors]
        self._widths = [accumulator.shape[1] for accumulator in empty]

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        return torch.cat([projector.start(batch_size, dtype=dtype, device=device) for projector in self.projectors], 1)

    def _parts(self, accumulator: Float[Tensor, "batch width"]) -> list[tuple[Projector, Tensor]]:
        """Return each projector with its view of the accumulator."""
        return list(zip(self.projectors, accumulator.split(self._widths, dim=1), strict=True))

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        for projector, part in self._parts(accumulator):
            projector.add(part, name, grads)

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for projector, part in self._parts(accumulator):
            projector.add_outer(part, name, left, right)

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for projector, part in self._parts(accumulator):
            projector.add_rows(part, name, shape, rows, values)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        return torch.cat([projector.finish(part) for projector, part in self._parts(accumulator)], 1)
