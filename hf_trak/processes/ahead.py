"""Work done a little ahead of its use, or behind it, by one thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
