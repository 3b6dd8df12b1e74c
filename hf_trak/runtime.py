"""Utilities for this process: bars, prefetching in a thread, SIGTERM as Ctrl-C, and pauses of Python's garbage collection."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
_END = object()


class Bar(tqdm):
    """A progress bar that also shows how much memory this process has, on a GPU too if torch uses one."""

    @property
    def format_dict(self) -> Any:
        return {**super().format_dict, "postfix": memory_in_use()}


def peak_memory() -> int:
    """Return the largest resident memory of this process so far in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def memory_in_use() -> str:
    """Return the memory of this process as text; on systems that tell only its peak, the peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            n_bytes = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        n_bytes = peak_memory()
    found = f"{n_bytes / (1 << 30):.1f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found += f", GPU {torch.cuda.memory_allocated() / (1 << 30):.1f} GiB"
    return found


@contextmanager
def dataset_bars(shown: bool) -> Iterator[None]:
    """Hush the bars of datasets unless they are to be shown."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    hushed = not shown and is_progress_bar_enabled()
    if hushed:
        disable_progress_bars()
    try:
        yield
    finally:
        if hushed:
            enable_progress_bars()


@contextmanager
def one_thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Yield an executor with one thread, which has ended when the block ends, also after an error."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"hf_trak-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(wait=True)


def ahead(items: Iterator[T], executor: ThreadPoolExecutor, *, depth: int = 2) -> Generator[T]:
    """Yield the items of `items`, which `executor` computes in advance. At most `depth` items wait.

    An error in `items` is raised here, at its position and unchanged. Closing the generator drops waiting items.
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
    """Pause garbage collection in the block, or in a function with this decorator.

    Imports of torch, transformers and datasets and loading a model create about a million objects that stay. The collector would visit
    them repeatedly, which takes a fifth of the CPU time before the first row. If the collector is off already, nothing changes.

    Args:
        for_good (`bool`): Exclude all objects that exist at the end of the block from later collections (`gc.freeze`). For commands, which
            own their process.
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
    """The process received SIGTERM from a launcher, a scheduler or `kill`. If it is not caught, the exit status is 143, as in shells."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block, raise [`Terminated`] in the main thread on SIGTERM, instead of ending the process immediately.

    A second SIGTERM ends it immediately. Nothing changes if another handler is installed, or in threads other than the main one.
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
