"""What other libraries print while a command runs: their warnings, once and in one line each, without chatter and progress bars."""

from __future__ import annotations

import logging
import sys

from hf_trak.plain_text import one_line

# Of no consequence: both backends of image processors are served.
_CHATTER = ("requires torchvision", "torchvision is not available", "Using a slow image processor")


def hush() -> None:
    """Keep transformers and datasets to warnings, one line each, and hide the progress bars of loading and saving."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_warning()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets"):
        for handler in logging.getLogger(name).handlers:
            # The library's own handler: what else listens is not the command's.
            if type(handler) is logging.StreamHandler and not any(isinstance(known, _OneLine) for known in handler.filters):
                handler.addFilter(_OneLine())


class _OneLine(logging.Filter):
    """Passes each warning once, as one line."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if any(part in said for part in _CHATTER):
            return False
        line = one_line(said)
        if line in self.seen:
            return False
        self.seen.add(line)
        record.msg, record.args = line, ()
        return True


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
