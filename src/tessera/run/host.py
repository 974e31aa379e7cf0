"""Copies between host and device that nothing waits for, and the executors that run a step's device work."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

CLOSE_S = 60.0  # how long the end of an executor waits for the step under way
log = logging.getLogger(__name__)


def finished(device: torch.device) -> None:
    """Waits for all that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Download:
    """Device tensors on their way to the host. `wait()` blocks, without spinning, until they are there, and until all
    that `device` was given before is done."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for host, tensor in zip(self._host, tensors, strict=True):
                host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        else:
            self._host = list(tensors)

    def wait(self) -> list[NDArray[Any]]:
        """The tensors as host arrays."""
        if self._event is not None:
            self._event.synchronize()
        return [tensor.numpy() for tensor in self._host]


class Executor(Protocol):
    """Runs a step's device work, in order."""

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Starts the work; the future may be done already."""

    def close(self) -> None:
        """Waits for what was submitted; nothing may be submitted afterwards."""


class Inline:
    """Runs the work at once, in the caller: for CUDA, where launching does not wait, and for one step at a time."""

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Runs the work; what it raises is raised here."""
        future: Future[T] = Future()
        future.set_result(work())
        return future

    def close(self) -> None:
        """Nothing to wait for."""


class Worker:
    """Runs the work in one thread of its own: torch lets go of the interpreter's lock while it computes.

    The thread is a daemon, so that a program may end without closing it. It is no pool of `concurrent.futures`, because
    those end with the main thread, while other threads of the program may still want answers. It starts with the first
    work. `failed` is told what the work raises, before anybody asks. What comes after work that failed fails with it:
    it builds on what was not done.
    """

    def __init__(self, name: str = "tessera-forward", failed: Callable[[BaseException], None] | None = None) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._failed = failed
        self._closed = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queues the work; what it raises is raised where the future is asked."""
        assert not self._closed, "the executor is closed"
        if not self._thread.ident:
            self._thread.start()
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            if self._closed:
                future.cancel()
                continue
            if self._broken is not None:
                future.set_exception(self._broken)
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                self._broken = error
                if self._failed is not None:
                    self._failed(error)
                future.set_exception(error)
            del item, work, future  # what it held must not outlive it

    def close(self) -> None:
        """Waits for the work under way; what is queued behind it is cancelled."""
        self._closed = True
        if not self._thread.ident:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("%s still computes after %g s and is left to itself", self._thread.name, CLOSE_S)
