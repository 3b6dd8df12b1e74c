"""SIGTERM as Ctrl-C is: what is being written is finished, the rest is dropped, and the process says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(SystemExit):
    """SIGTERM has come: from a launcher, a scheduler or `kill`. Uncaught, it ends the process with status 143, as shells have it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, raise [`Terminated`] in the main thread where SIGTERM would have ended the process on the spot.

    A second SIGTERM does end it on the spot. A handler of somebody else's is left alone, and so is a thread that is not the main one.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
