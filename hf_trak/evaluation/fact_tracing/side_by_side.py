"""Gradients with every parameter on its own: sketched apart, laid side by side, scaled if wanted.

Fact tracing compares parameters one by one: layers are chosen, cosines are taken per parameter, and Adam's second moments scale the
entries. A sketch that mixes all parameters can do none of this.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.projectors import BlockCountSketch, Identity, Projector


class SideBySide(Projector):
    """One projector per parameter: none where the parameter is small enough, else a block count sketch.

    Args:
        sizes (`Mapping[str, int]`): Entries of each parameter.
        dim (`int`): Numbers kept per parameter, at most.
        scales (`Mapping[str, Tensor]`, *optional*): What to multiply the gradient's entries by, shaped as the parameter.
    """

    def __init__(
        self, sizes: Mapping[str, int], *, dim: int, seed: int = 0, scales: Mapping[str, Tensor] | None = None
    ) -> None:
        self.parts: dict[str, Projector] = {
            name: Identity(proj_dim=size, sizes={name: size}) if size <= dim else BlockCountSketch(proj_dim=dim, seed=seed)
            for name, size in sizes.items()
        }
        super().__init__(proj_dim=sum(part.proj_dim for part in self.parts.values()), seed=seed)
        self.scales = dict(scales or {})
        widths = [part.start(1, dtype=torch.float32, device=torch.device("cpu")).shape[1] for part in self.parts.values()]
        self._accumulators = _slices(self.parts, widths)
        self.slices = _slices(self.parts, [part.proj_dim for part in self.parts.values()])
        """Where each parameter's numbers lie in the features."""

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        width = max(place.stop for place in self._accumulators.values())
        return torch.zeros(batch_size, width, dtype=dtype, device=device)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        return torch.cat([part.finish(accumulator[:, self._accumulators[name]]) for name, part in self.parts.items()], 1)

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        scaled = grads * self.scales[name].to(grads) if name in self.scales else grads
        self.parts[name].add(accumulator[:, self._accumulators[name]], name, scaled)

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        if name in self.scales:  # no longer a sum of outer products
            super().add_outer(accumulator, name, left, right)
        else:
            self.parts[name].add_outer(accumulator[:, self._accumulators[name]], name, left, right)

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        scaled = values * self.scales[name].to(values)[rows] if name in self.scales else values
        self.parts[name].add_rows(accumulator[:, self._accumulators[name]], name, shape, rows, scaled)


def _slices(parts: Mapping[str, Projector], widths: list[int]) -> dict[str, slice]:
    slices, start = {}, 0
    for name, width in zip(parts, widths, strict=True):
        slices[name] = slice(start, start + width)
        start += width
    return slices
