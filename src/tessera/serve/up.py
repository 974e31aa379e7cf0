"""`tessera up`: the processes of a deployment from their start to their end. Every wait has a way out.

States of a process: starting, ready (its /health says so), ended. One that was ready and gives no answer any more is
killed. What follows when a worker ends by itself or so is asked, as of `tessera serve`: all end (exit), it is started
anew at its old address (restart), or the others go on (continue).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import httpx

from tessera.core.errors import DeadlineError, PeerError
from tessera.run.children import how_it_ended
from tessera.serve.deployment import KEY, Deployment, Process
from tessera.serve.here import Child, Starter
from tessera.serve.signals import StopSignals

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3  # between two looks at a process that starts
PROBE_SECONDS = 5.0
PROBES = 6  # in a row, without any answer, after which one is killed
RESTART_SECONDS = 2.0  # before a process is started again
WINDOW_SECONDS = 600.0  # within which restarts are counted
KILLED_SECONDS = 10.0
State = Literal["starting", "ready", "ended"]
OnFailure = Literal["exit", "restart", "continue"]


@dataclass(slots=True)
class Running:
    """A process and how it does. `why`: it was killed."""

    process: Process
    child: Child
    state: State = "starting"
    since: float = field(default_factory=time.monotonic)
    code: int | None = None
    why: str = ""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def end(self) -> str:
        """How it ended, for people: one that was killed for a reason of ours did not run out of memory."""
        how = f"{self.why} and was killed" if self.why else how_it_ended(self.code or 0)
        return f"{self.process.name} {how}"


class View(Protocol):
    """Shows people what happens."""

    def line(self, name: str, text: str) -> None:
        """A process wrote a line."""

    def change(self, what: str, running: Iterable[Running]) -> None:
        """Something became of a process."""


class Supervisor:
    """Runs one deployment. Seconds: `patience` from the start until all are ready, and until one is that was started
    anew; `drain` for an orderly end; `silence` (up to twice that) until one that was ready must answer a probe, well or
    not.

    `restarts`: most within ten minutes.
    """

    def __init__(
        self,
        deployment: Deployment,
        starter: Starter,
        view: View,
        on_failure: OnFailure = "exit",
        patience: float = 1800.0,
        drain: float = 35.0,
        restarts: int = 3,
        silence: float = 30.0,
    ) -> None:
        self._deployment, self._starter, self._view = deployment, starter, view
        self._on_failure, self._patience, self._drain = on_failure, patience, drain
        self._probe = min(PROBE_SECONDS, silence / PROBES)
        self._most, self._restarts = restarts, deque[float]()
        self._running: dict[str, Running] = {}
        self._ended: asyncio.Queue[Running | Exception | None] = asyncio.Queue()  # None: the time to start is over
        self._all_ready = False
        self._stopping = False

    async def run(self, signals: StopSignals) -> None:
        """Until a signal. Raises PeerError when a process ended and all were to stop with it, DeadlineError."""
        stop = asyncio.create_task(signals.first.wait())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({stop, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                await watch
        finally:
            self._stopping = True
            for task in (stop, watch):
                task.cancel()
            await asyncio.gather(stop, watch, return_exceptions=True)
            await self._stop_all()
            await self._starter.close()

    async def _watch(self) -> None:
        asyncio.get_running_loop().call_later(self._patience, self._ended.put_nowait, None)
        for process in (*self._deployment.workers, self._deployment.router):
            await self._start(process)
        while True:
            ended = await self._ended.get()
            if isinstance(ended, Exception):
                raise ended
            if ended is not None:
                await self._one_ended(ended)
            elif not self._all_ready:
                late = ", ".join(one.process.name for one in self._running.values() if one.state != "ready")
                raise DeadlineError(f"not ready within {self._patience:g} s (--start-timeout): {late}")

    async def _one_ended(self, one: Running) -> None:
        how = one.end()
        if self._on_failure == "exit" or one.process.role == "router":
            raise PeerError(f"{how}, so everything ends")
        if self._on_failure == "restart":
            now = time.monotonic()
            self._restarts = deque(began for began in self._restarts if now - began < WINDOW_SECONDS)
            if len(self._restarts) >= self._most:
                raise PeerError(f"{how}; {self._most} restarts in {WINDOW_SECONDS:g} s are all (--max-restarts)")
            self._restarts.append(now)
            await asyncio.sleep(RESTART_SECONDS)
            await self._start(one.process)

    async def _start(self, process: Process) -> None:
        child = await self._starter.start(process)
        one = self._running[process.name] = Running(process, child)
        one.tasks = [asyncio.create_task(self._told(work)) for work in (self._read(one), self._probed(one))]
        self._change(f"{process.name} starts ({child.where})")

    async def _told(self, work: Coroutine[None, None, None]) -> None:
        """Runs a task of a process; what goes wrong with it ends everything."""
        try:
            await work
        except Exception as error:
            self._ended.put_nowait(error)

    async def _read(self, one: Running) -> None:
        """Shows what it writes, and notices its end. It is read to its end even where it cannot be shown any more."""
        async for line in one.child.lines():
            with self._shown():
                self._view.line(one.process.name, line)
        one.code = await one.child.wait()
        one.state, one.since = "ended", time.monotonic()
        self._change(one.end())
        if not self._stopping:
            self._ended.put_nowait(one)

    def _change(self, what: str) -> None:
        with self._shown():
            self._view.change(what, self._running.values())

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """A view that fails ends everything, in order."""
        try:
            yield
        except Exception as error:
            self._ended.put_nowait(error)

    async def _probed(self, one: Running) -> None:
        """Asks it until it is ready, and from then on whether it still answers. One without an address is ready when
        the one that it belongs to is."""
        key = one.process.environment.get(KEY)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        began = time.monotonic()
        async with httpx.AsyncClient(timeout=PROBE_SECONDS, trust_env=False, headers=headers) as http:
            while one.process.url:
                healthy = await _health(http, one.process.url) == 200
                if one.state != "starting":
                    return
                if healthy:
                    break
                if self._all_ready and time.monotonic() - began > self._patience:
                    await self._kill(one, f"was not ready within {self._patience:g} s (--start-timeout)")
                    return
                await asyncio.sleep(POLL_SECONDS)
            self._ready(one, began)
            if one.process.url:
                await self._until_silent(one, http)

    def _ready(self, one: Running, began: float) -> None:
        one.state, one.since = "ready", time.monotonic()
        where = f" at {one.process.url}" if one.process.url else ""
        self._change(f"{one.process.name} is ready{where} after {one.since - began:.1f} s")
        count = len(self._deployment.workers) + 1
        if len(self._running) == count and all(r.state == "ready" for r in self._running.values()):
            self._all_ready = True
            self._change(f"all {count} processes are ready: {self._deployment.router.url}")

    async def _until_silent(self, one: Running, http: httpx.AsyncClient) -> None:
        """Kills it when it gives no answer. Probes are counted, not seconds: this process may have been stopped too."""
        missed, heard = 0, time.monotonic()
        while one.state == "ready" and not self._stopping:
            await asyncio.sleep(self._probe)
            if await _health(http, one.process.url, self._probe) is not None:
                missed, heard = 0, time.monotonic()
            elif (missed := missed + 1) >= PROBES and one.state == "ready" and not self._stopping:
                await self._kill(one, f"did not answer for {time.monotonic() - heard:.1f} s")
                return

    async def _kill(self, one: Running, why: str) -> None:
        """What follows is what follows its end."""
        one.why = why
        await one.child.signal(signal.SIGKILL)

    async def _stop_all(self) -> None:
        """The router first, so that what runs can finish; then the workers; whoever stays is killed."""
        router = [one for one in self._running.values() if one.process.role == "router"]
        workers = [one for one in self._running.values() if one.process.role != "router"]
        try:
            for some in (router, workers):
                await self._stop(some)
        finally:
            for one in self._running.values():
                for task in one.tasks:
                    task.cancel()
                await asyncio.gather(*one.tasks, return_exceptions=True)

    async def _stop(self, some: list[Running]) -> None:
        left = [one for one in some if one.code is None]
        for number, seconds in ((signal.SIGTERM, self._drain), (signal.SIGKILL, KILLED_SECONDS)):
            for one in left:
                await one.child.signal(number)
            ends = [one.tasks[0] for one in left]
            if ends:
                await asyncio.wait(ends, timeout=seconds)
            left = [one for one in left if one.code is None]
            if left and number == signal.SIGTERM:
                names = ", ".join(one.process.name for one in left)
                self._change(f"killed after {seconds:g} s: {names}")


async def _health(http: httpx.AsyncClient, url: str, seconds: float = PROBE_SECONDS) -> int | None:
    """The status of /health; None when nobody answers."""
    with contextlib.suppress(httpx.HTTPError):
        return (await http.get(f"{url}/health", timeout=seconds)).status_code
    return None
