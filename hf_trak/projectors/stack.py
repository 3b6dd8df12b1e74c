"""Several sketches of the same gradients, side by side: what lets one pass of gradients serve many members."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.projectors.base import Projector


class StackedProjector(Projector):
    """Projectors that share one wide accumulator, each in columns of its own.

    Features are the projectors' features one after another, the same numbers that each makes alone.

    Args:
        projectors (`Sequence[Projector]`): At least one.
    """

    def __init__(self, projectors: Sequence[Projector]) -> None:
        if not projectors:
            raise ValueError("A stack needs at least one projector, but there are none.")
        super().__init__(proj_dim=sum(projector.proj_dim for projector in projectors), seed=projectors[0].seed)
        self.projectors = list(projectors)
        # The accumulator's width is each projector's own business.
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
