"""The front process from its start to its end: engine processes, HTTP, readiness, drain. Every wait has a way out.

A wait ends with what it waits for, with the engine's failure, with a signal (`Stopped`), or at its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from tessera.core.errors import ConfigError, DeadlineError, PeerError, TesseraError
from tessera.core.messages import Fatal, StepReport, Stop
from tessera.serve import announce, logs
from tessera.serve.app import make_app
from tessera.serve.assets import make_reader
from tessera.serve.client import EngineClient
from tessera.serve.fleet import Advance, Fleet
from tessera.serve.listener import Listener, bind, url
from tessera.serve.metrics import Metrics
from tessera.serve.server import Options, Server
from tessera.serve.signals import StopSignals
from tessera.serve.steplog import StepLog
from tessera.serve.trace import make_tracing
from tessera.serve.wire import Refusal, Starting

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[str, bool], AbstractContextManager[Advance]]

PREPARE_SECONDS = 6 * 3600.0  # the model may have to be downloaded first
SAY_SECONDS = 5.0  # an engine that waits in vain while it starts has a deadline of its own, and says for whom
ABORT_SECONDS = 2.0  # for the answers of requests that the end aborts
STOP_SECONDS = 5.0  # for the engine to end by itself


class Stopped(Exception):
    """A signal asked for the end."""


class Front:
    """One server. `progress`: shows how far the weights are loaded."""

    def __init__(self, fleet: Fleet, signals: StopSignals, progress: Progress) -> None:
        self._fleet, self._signals, self._progress = fleet, signals, progress
        self._began = time.monotonic()

    async def run(self, asked: Mapping[str, object], environ: Mapping[str, str]) -> None:
        """Serves what is asked until a signal ends it. Raises TesseraError when it cannot be, or the engine fails."""
        with contextlib.suppress(Stopped):
            asking = self._starting(asked, environ)
            starting = await self._until(asking, PREPARE_SECONDS, "the engine's configuration")
            config = starting.resolved.config
            logs.configure(config.logging.level)
            announce.decisions(starting.resolved)
            with bind(config.serving.host, config.serving.port) as listening:
                self._fleet.grow(starting)
                server = make_server(starting, self._fleet)
                await self._serve(server, Listener(make_app(server), listening, config.logging.requests), starting)

    async def _starting(self, asked: Mapping[str, object], environ: Mapping[str, str]) -> Starting:
        message = await self._fleet.resolve(asked, environ)
        match message:
            case Starting():
                return message
            case Refusal():
                raise ConfigError(list(message.conflicts))
            case Fatal():
                raise TesseraError(message.error)
        raise PeerError(self._fleet.end())

    async def _serve(self, server: Server, listener: Listener, starting: Starting) -> None:
        serving, client = starting.resolved.config.serving, server.client
        tasks = [asyncio.create_task(work) for work in (self._fleet.keep(client, server.probe), client.watch())]
        try:
            await self._until(self._loaded(client), client=client)
            announce.ready(server, url(listener.listening), time.monotonic() - self._began)
            await self._until(asyncio.shield(listener.task), client=client)
            raise PeerError("the HTTP listener has ended")
        except Stopped:
            await self._drain(server, serving.drain_timeout)
        finally:
            await listener.close()
            await asyncio.to_thread(server.options.tracing.close)
            for task in tasks:  # from here on the end of an engine is what was asked for
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if client.failure is None and any(replica.ready.is_set() for replica in client.replicas):
                client.send(Stop())
                if not await self._fleet.ended(STOP_SECONDS):
                    log.warning("an engine has not ended within %g s and is killed", STOP_SECONDS)

    async def _loaded(self, client: EngineClient) -> None:
        """Until a real generation went through every engine. One that hangs meanwhile is ended by the fleet."""
        with self._progress("loading weights", False) as self._fleet.advance:
            for replica in client.replicas:
                await replica.warm.wait()

    async def _drain(self, server: Server, seconds: float) -> None:
        """Takes nothing new, lets what runs finish within `seconds`, then aborts it."""
        server.draining = True
        replicas = [replica for replica in server.client.replicas if replica.failure is None]
        if server.running:
            log.info("%d requests run; they have %g s to finish", len(server.running), seconds)
        await self._idle(server, seconds)
        if server.running:
            log.warning("%d requests are aborted", server.abort(None))
            await self._idle(server, ABORT_SECONDS)
        for replica in replicas:
            if replica.failure is not None or replica.stale:
                raise replica.failure or replica.silent()

    async def _idle(self, server: Server, seconds: float) -> None:
        ends = [asyncio.ensure_future(event.wait()) for event in (server.quiet, server.client.failed)]
        await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for one in ends:
            one.cancel()

    async def _until(
        self, wanted: Awaitable[T], seconds: float | None = None, what: str = "", client: EngineClient | None = None
    ) -> T:
        """Waits. Raises Stopped on a signal, what made the engine fail, DeadlineError after `seconds`."""
        task = asyncio.ensure_future(wanted)
        ways_out = [asyncio.ensure_future(self._signals.first.wait())]
        if client is not None:
            ways_out.append(asyncio.ensure_future(client.failed.wait()))
        try:
            await asyncio.wait({task, *ways_out}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if client is not None and client.failure is not None:
                raise client.failure
            if self._signals.first.is_set():
                raise Stopped
            raise DeadlineError(f"waited {seconds:g} s for {what}")
        finally:
            for one in (task, *ways_out):
                one.cancel()
            await asyncio.gather(task, *ways_out, return_exceptions=True)


def make_server(starting: Starting, fleet: Fleet) -> Server:
    """What answers requests, for engines that start."""
    config = starting.resolved.config
    metrics = Metrics(config.model.served_name, config.memory.page_size, config.mesh.num_dp)
    lines = StepLog(config.logging.decode_interval, config.mesh.num_dp)

    def report(step: StepReport) -> None:
        metrics.step(step)
        lines(step)

    scheduling, mesh = config.scheduling, config.mesh
    most = scheduling.max_running * mesh.num_dp + scheduling.max_queued * mesh.replicas
    patience = config.serving.start_timeout + SAY_SECONDS
    client = EngineClient(fleet.sends, most, config.serving.watchdog_timeout, report, mesh.balance, patience)
    options = Options(
        model_path=starting.folder,
        served_model_name=config.model.served_name,
        api_key=config.serving.api_key,
        stream_interval=config.serving.stream_interval,
        log_requests=config.logging.requests,
        profiles=config.logging.profiles,
        tracing=make_tracing(config.logging.trace, config.logging.collector, "tessera"),
        info={
            "config": config.public(),
            "decisions": [str(decision) for decision in starting.resolved.decisions],
        },
    )
    reader = make_reader(config, Path(starting.folder), starting.vocab_size)
    return Server(client, reader, options, metrics)
