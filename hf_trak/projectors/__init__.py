"""Sketches of gradients: `make_projector` builds one by name."""

from hf_trak.projectors.base import Projector
from hf_trak.projectors.block_count_sketch import BlockCountSketch
from hf_trak.projectors.dense_rademacher import DenseRademacher
from hf_trak.projectors.fast_jl import FastJL
from hf_trak.projectors.identity import Identity

PROJECTORS: dict[str, type[Projector]] = {
    "block_count_sketch": BlockCountSketch,
    "dense_rademacher": DenseRademacher,
    "identity": Identity,
}
"""Those that run anywhere and mean the same everywhere."""

OPTIONAL_PROJECTORS: dict[str, type[Projector]] = {"fast_jl": FastJL}
"""Those that need an extension, and are tied to hardware."""


def make_projector(name: str, *, proj_dim: int, seed: int, fold: int = 1) -> Projector:
    """Return the projector called `name`; `fold` is for those that fold.

    Raises:
        ValueError: If there is no such projector; the message lists those there are.
        ImportError: If it needs an extension that is not installed.
    """
    kinds = PROJECTORS | OPTIONAL_PROJECTORS
    if name not in kinds:
        raise ValueError(f"Unknown projector {name!r}; choose one of {', '.join(kinds)}.")
    kind = kinds[name]
    return kind(proj_dim=proj_dim, seed=seed, fold=fold) if kind is BlockCountSketch else kind(proj_dim=proj_dim, seed=seed)


__all__ = [
    "OPTIONAL_PROJECTORS",
    "PROJECTORS",
    "BlockCountSketch",
    "DenseRademacher",
    "FastJL",
    "Identity",
    "Projector",
    "make_projector",
]
