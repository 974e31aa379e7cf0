"""Copies between host and device that nothing waits for, and the executors that run a step's device work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device: on CPU the same memory, on CUDA by way of pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def upload_columns(columns: Sequence[NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Int32 columns on the device, by one copy."""
    packed = upload(np.concatenate(columns).astype(np.int32, copy=False), device)
    return packed.split([len(c) for c in columns])


class Download:
    """Device tensors on their way to the host. `wait()` blocks, without spinning, until they are there."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
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
    """Runs the work in one thread of its own: torch lets go of the interpreter's lock while it computes."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "tessera-forward")

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queues the work; what it raises is raised where the future is asked."""
        return self._pool.submit(work)

    def close(self) -> None:
        """Waits for the queue to run dry."""
        self._pool.shutdown(wait=True, cancel_futures=True)
