"""No projection: features are the gradients themselves, for tests and very small models."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from hf_trak.projectors.base import Projector


class Identity(Projector):
    """Lay parameters side by side in the order in which they are declared; `proj_dim` must be their total size.

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
