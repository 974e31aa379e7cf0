"""An engine core in this process: its step loop in one thread, the event loop of its client in another.

Both threads are daemons: a program that ends without closing them does not hang, and its other threads are served
until they end too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from tessera.core.errors import DeadlineError, PeerError
from tessera.core.messages import Outbound, Stop
from tessera.run.core import EngineCore
from tessera.serve.client import EngineClient

T = TypeVar("T")

START_S = 30.0
CLOSE_S = 90.0  # longer than an executor waits for the step under way
GRACE_S = 2.0  # tasks that were told of the end get this long to say so
log = logging.getLogger(__name__)


class LocalEngine:
    """A core and its client. `submit` may be called from any thread; coroutines run on the client's loop.

    `make_core(sink)` builds the core, in the caller's thread. `silence`: seconds without a sign of life of the core
    after which requests fail.
    """

    def __init__(self, make_core: Callable[[Callable[[Outbound], None]], EngineCore], silence: float) -> None:
        self.core = make_core(self._deliver)
        self.client = EngineClient([self.core.post], silence=silence)
        self._lock = threading.RLock()  # the garbage collector may close it inside `submit`
        self._closed = False
        self._up = threading.Event()
        self._threads = (
            threading.Thread(target=self.core.run, name="tessera-steps", daemon=True),
            threading.Thread(target=lambda: asyncio.run(self._serve()), name="tessera-front", daemon=True),
        )
        steps, front = self._threads
        front.start()
        if not self._up.wait(START_S):
            raise DeadlineError(f"the event loop of the engine did not start within {START_S:g} s")
        steps.start()

    async def _serve(self) -> None:
        """Runs until `close`; whoever waits then is told, and has `GRACE_S` to pass it on."""
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        watch = asyncio.create_task(self.client.watch())
        self._up.set()
        await self._ending.wait()
        watch.cancel()
        self.client.fail(PeerError("the engine is closed"))
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=GRACE_S)

    def _deliver(self, message: Outbound) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: a core that outlived it has no listeners
            self._loop.call_soon_threadsafe(self.client.deliver, message)

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Starts a coroutine on the client's loop; cancelling the future cancels it. PeerError when closed."""
        with self._lock:  # so that it is on the loop before the end is
            if self._closed:
                raise PeerError("the engine is closed")
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def close(self) -> None:
        """Aborts what runs and ends both threads. May be called again, and from any thread."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self.core.post(Stop())
        steps, front = self._threads
        self._join(steps)
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._ending.set)
        self._join(front)

    def _join(self, thread: threading.Thread) -> None:
        if thread is threading.current_thread():  # the garbage collector may run anywhere
            return
        thread.join(CLOSE_S)
        if thread.is_alive():
            log.warning("%s still runs %g s after the engine was closed", thread.name, CLOSE_S)


def wait_for(future: Future[T]) -> T:
    """The result of a future. Whoever is interrupted here (Ctrl-C) ends what he waited for."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
