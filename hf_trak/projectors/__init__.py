"""Sketches of gradients: `make_projector` builds one by name."""

from hf_trak.projectors.base import Projector
from hf_trak.projectors.block_count_sketch import BlockCountSketch
from hf_trak.projectors.dense_rademacher import DenseRademacher
from hf_trak.projectors.identity import Identity

PROJECTORS: dict[str, type[Projector]] = {
    "block_count_sketch": BlockCountSketch,
    "dense_rademacher": DenseRademacher,
    "identity": Identity,
}


def make_projector(name: str, *, proj_dim: int, seed: int) -> Projector:
    """Return the projector called `name`.

    Raises:
        ValueError: If there is no such projector; the message lists those there are.
    """
    if name not in PROJECTORS:
        raise ValueError(f"Unknown projector {name!r}; choose one of {', '.join(PROJECTORS)}.")
    return PROJECTORS[name](proj_dim=proj_dim, seed=seed)


__all__ = ["PROJECTORS", "BlockCountSketch", "DenseRademacher", "Identity", "Projector", "make_projector"]
