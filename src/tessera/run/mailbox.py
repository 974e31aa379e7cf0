"""A queue between threads that can be waited for beside sockets and other files."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import weakref
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


def counter() -> int:
    """A file that is readable once something was written to it (eventfd(2))."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def readable(files: Iterable[int], seconds: float | None) -> set[int]:
    """Those of `files` that are readable; blocks until one is, at most `seconds`. A file that broke counts."""
    poller = select.poll()
    for file in files:
        poller.register(file, select.POLLIN)
    return {file for file, _ in poller.poll(None if seconds is None else 1000 * seconds)}


class Mailbox(Generic[T]):
    """Any thread puts, one takes. `there` is readable when something was put since the last `take`; it is closed when
    nobody holds the box any more, so that a late `put` harms nobody."""

    def __init__(self) -> None:
        self.there = counter()
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        weakref.finalize(self, os.close, self.there)

    def put(self, item: T) -> None:
        """From any thread; never blocks."""
        self._queue.put(item)
        os.eventfd_write(self.there, 1)

    def take(self) -> list[T]:
        """All that is there, in order; never blocks."""
        with contextlib.suppress(BlockingIOError):  # before the queue is emptied, or what comes between would be missed
            os.eventfd_read(self.there)
        found: list[T] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._queue.get_nowait())
        return found
