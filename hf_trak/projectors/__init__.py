"""Sketches of gradients: `make_projector` builds one by name, `make_projectors` one or several side by side."""

from collections.abc import Sequence

from hf_trak.projectors.base import Projector, StackedProjector
from hf_trak.projectors.count_sketch import BlockCountSketch
from hf_trak.projectors.dense import DenseRademacher, Identity
from hf_trak.projectors.fast_jl import FastJL

PROJECTORS: dict[str, type[Projector]] = {
    "block_count_sketch": BlockCountSketch,
    "dense_rademacher": DenseRademacher,
    "identity": Identity,
}
"""Projectors that run on any device and give the same features on each."""

OPTIONAL_PROJECTORS: dict[str, type[Projector]] = {"fast_jl": FastJL}
"""Projectors that need an extension and whose features depend on the hardware."""


def make_projector(name: str, *, proj_dim: int, seed: int, fold: int = 1) -> Projector:
    """Return the projector called `name`; `fold` applies to block_count_sketch only.

    ```python
    >>> from hf_trak.projectors import make_projector
    >>> projector = make_projector("block_count_sketch", proj_dim=64, seed=0)
    >>> type(projector).__name__
    'BlockCountSketch'
    ```

    Raises:
        ValueError: If there is no such projector. The message lists the valid names.
        ImportError: If it needs an extension that is not installed.
    """
    kinds = PROJECTORS | OPTIONAL_PROJECTORS
    if name not in kinds:
        raise ValueError(f"Unknown projector {name!r}; choose one of {', '.join(kinds)}.")
    kind = kinds[name]
    return kind(proj_dim=proj_dim, seed=seed, fold=fold) if kind is BlockCountSketch else kind(proj_dim=proj_dim, seed=seed)


def make_projectors(name: str, *, proj_dim: int, seeds: Sequence[int], fold: int = 1) -> Projector:
    """Return the projector called `name`, or one per seed in a stack.

    Raises:
        ValueError: If there is no such projector, a seed occurs twice, or several seeds are given for a projector without randomness.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"Sketch seeds must differ, but are {', '.join(map(str, seeds))}: equal sketches add nothing.")
    if name == "identity" and len(seeds) > 1:
        raise ValueError(
            f"The identity projector has no randomness, so its {len(seeds)} sketches would be the same. Use one sketch seed."
        )
    projectors = [make_projector(name, proj_dim=proj_dim, seed=seed, fold=fold) for seed in seeds]
    return projectors[0] if len(projectors) == 1 else StackedProjector(projectors)


__all__ = [
    "OPTIONAL_PROJECTORS",
    "PROJECTORS",
    "BlockCountSketch",
    "DenseRademacher",
    "FastJL",
    "Identity",
    "Projector",
    "StackedProjector",
    "make_projector",
    "make_projectors",
]
