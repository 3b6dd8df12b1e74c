"""This process: prefetching by one thread, SIGTERM as Ctrl-C, and pauses of Python's garbage collector."""

from __future__ import annotations

import gc
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def one_thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """A thread that has finished its work and is gone when the block is left, however it is left."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"hf_trak-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True)


def ahead(items: Iterator[T], executor: ThreadPoolExecutor, *, depth: int = 2) -> Generator[T]:
    """Yield what `items` yields, made by `executor` while the caller is busy; at most `depth` of them wait.

    An error in `items` is raised here, in its turn and as it is. Closing this drops what waits.
    """
    pending = deque(executor.submit(next, items, _END) for _ in range(depth))
    try:
        while (item := pending.popleft().result()) is not _END:
            pending.append(executor.submit(next, items, _END))
            yield item  # type: ignore[misc]
    finally:
        for future in pending:
            future.cancel()


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
