"""Errors that carry what a caller needs to say more."""

from __future__ import annotations


class MissingProcessor(ValueError):
    """Raw rows need a tokenizer or an image processor, and there is none. Whoever knows the checkpoint names it."""
