"""Silence for other libraries' chatter: what a command prints is its own, and the progress bars of long work."""

from __future__ import annotations

import logging
import sys


def hush() -> None:
    """Keep transformers and datasets to errors, and hide the progress bars of loading and saving."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def say_which_columns() -> None:
    """Print, on standard error, the line that says which columns of a dataset are read."""
    logger = logging.getLogger("hf_trak.building.all_passes")
    for handler in [handler for handler in logger.handlers if handler.name == "columns"]:
        logger.removeHandler(handler)  # of an earlier command of this process, whose standard error may be another
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "columns"
    handler.setFormatter(logging.Formatter("hf-trak: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
