"""Python's collector of garbage, kept away from what makes none: imports, and the loading of models."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Within the block, or a function decorated with this, do not look for cycles of dead objects.

    Importing torch, transformers and datasets and loading a model make some million objects that stay. The collector would go
    through them again and again: a fifth of the CPU time to the first row. Where it is off already, nothing changes.

    Args:
        for_good (`bool`): Never look at what the block made, nor at anything made before it. For commands, whose process is their own.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good:
            gc.freeze()
        if was_on:
            gc.enable()
