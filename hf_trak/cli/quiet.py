"""Silence for other libraries' chatter: what a command prints is its own, and the progress bars of long work."""

from __future__ import annotations


def hush() -> None:
    """Keep transformers and datasets to errors, and hide the progress bars of loading and saving."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
