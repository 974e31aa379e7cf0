"""Kernels compiled ahead, by several processes at once, into Triton's cache: no device is needed, and none is touched.

What a step launches is found by running it on tensors without memory: a launch asks Triton for its kernel, and the hook
that Triton calls before it compiles notes which one and says that there is nothing to compile, so nothing is launched.
Threads would not do: Triton keeps the interpreter's lock while it compiles (two threads took as long as one).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cached_property
from multiprocessing import get_context
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

Wanted = tuple[str, str, str]  # module and name of a kernel, and what Triton says of one specialisation of it


class Stand:
    """Triton's driver for a chip that need not be here: enough to compile, not to launch."""

    launcher_cls = CudaLauncher

    def __init__(self, capability: tuple[int, int]) -> None:
        major, minor = capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    @cached_property
    def utils(self) -> CudaUtils:
        """What launchers are made with: needs CUDA's driver library."""
        return CudaUtils()

    def get_current_target(self) -> GPUTarget:
        """The chip that is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Some device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Some stream."""
        return 0


@contextmanager
def finding(found: Callable[[Wanted], None]) -> Iterator[None]:
    """Inside, kernels are neither compiled nor launched; `found` is told of each specialisation, once."""
    known: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **more: Any) -> bool:
        name = f"{fn.module}.{fn.name}"
        if (name, key) not in known:
            known.add((name, key))
            found((fn.module, fn.name, more["compile"]["specialization_data"]))
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = None


def compile_one(wanted: Wanted, launchers: bool) -> bool:
    """Compiles a specialisation, unless it is in Triton's cache; whether it was not. `launchers`: and what launches it,
    where Triton makes that for each signature; needs CUDA's driver library."""
    module, name, data = wanted
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listen
    kernel = getattr(importlib.import_module(module), name).preload(data)
    if launchers:
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    return not all(hits)


def _begin(prepare: Callable[[], None], stand: Stand) -> None:
    prepare()
    knobs.runtime.jit_cache_hook = None
    driver.set_active(stand)


class Result(NamedTuple):
    """What became of kernels: how many are new in the cache, were there, or are late: not there in time, or not at all,
    since a process that compiled was killed; and why some could not be compiled."""

    new: int
    there: int
    late: int
    failed: tuple[str, ...]


class Compilers:
    """`number` processes that compile what they are given. `begin` is called first in each of them."""

    def __init__(self, capability: tuple[int, int], number: int, begin: Callable[[], None], launchers: bool) -> None:
        stand = Stand(capability)
        driver.set_active(stand)
        # Forked, before there are threads: they have all modules from the start.
        self._pool = ProcessPoolExecutor(number, get_context("fork"), _begin, (begin, stand))
        self._launchers = launchers
        self._work: list[Future[bool]] = []
        self._pool.submit(os.getpid).result()

    def add(self, wanted: Wanted) -> None:
        """Has a kernel compiled."""
        try:
            work = self._pool.submit(compile_one, wanted, self._launchers)
        except BrokenProcessPool as error:
            work = Future()
            work.set_exception(error)
        self._work.append(work)

    def finish(self, seconds: float) -> Result:
        """Waits so long for all; what has not begun by then is left out."""
        done, late = wait(self._work, seconds)
        self._pool.shutdown(wait=False, cancel_futures=True)
        errors = [error for work in done if (error := work.exception()) is not None]
        failed = tuple(f"{type(e).__name__}: {e}" for e in errors if not isinstance(e, BrokenProcessPool))
        over = [work.result() for work in done if work.exception() is None]
        new = sum(over)
        return Result(new, len(over) - new, len(late) + len(errors) - len(failed), failed)
