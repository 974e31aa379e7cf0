"""The front process from its start to its end: engine process, HTTP, readiness, drain. Every wait has a way out.

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
from tessera.serve.assets import load_assets
from tessera.serve.client import EngineClient
from tessera.serve.listener import Listener, bind, url
from tessera.serve.metrics import Metrics
from tessera.serve.process import EngineProcess
from tessera.serve.schema import Limits, Reader
from tessera.serve.server import Options, Server
from tessera.serve.signals import StopSignals
from tessera.serve.steplog import StepLog
from tessera.serve.trace import make_tracing
from tessera.serve.wire import Begin, Loading, Refusal, Starting

log = logging.getLogger(__name__)
T = TypeVar("T")
Advance = Callable[[int, int], None]
Progress = Callable[[str, bool], AbstractContextManager[Advance]]

PREPARE_SECONDS = 6 * 3600.0  # the model may have to be downloaded first
ABORT_SECONDS = 2.0  # for the answers of requests that the end aborts
STOP_SECONDS = 5.0  # for the engine to end by itself


class Stopped(Exception):
    """A signal asked for the end."""


class Front:
    """One server. `progress`: shows how far the weights are loaded."""

    def __init__(self, engine: EngineProcess, signals: StopSignals, progress: Progress) -> None:
        self._engine, self._signals, self._progress = engine, signals, progress
        self._began = time.monotonic()
        self._advance: Advance = lambda done, total: None

    async def run(self, asked: Mapping[str, object], environ: Mapping[str, str]) -> None:
        """Serves what is asked until a signal ends it. Raises TesseraError when it cannot be, or the engine fails."""
        with contextlib.suppress(Stopped):
            self._engine.send(Begin(dict(asked), dict(environ)))
            starting = await self._until(self._starting(), PREPARE_SECONDS, "the engine's configuration")
            config = starting.resolved.config
            logs.configure(config.logging.level)
            announce.decisions(starting.resolved)
            with bind(config.serving.host, config.serving.port) as listening:
                server = make_server(starting, self._engine)
                await self._serve(server, Listener(make_app(server), listening, config.logging.requests), starting)

    async def _starting(self) -> Starting:
        message = await self._engine.receive()
        match message:
            case Starting():
                return message
            case Refusal():
                raise ConfigError(list(message.conflicts))
            case Fatal():
                raise TesseraError(message.error)
        raise PeerError(self._engine.end())

    async def _serve(self, server: Server, listener: Listener, starting: Starting) -> None:
        serving, client = starting.resolved.config.serving, server.client
        tasks = [asyncio.create_task(work) for work in (self._listen(client), client.watch())]
        try:
            await self._until(self._loaded(client), client=client)
            await self._until(server.probe(), serving.watchdog_timeout, "the first token", client)
            server.warm = True
            announce.ready(server, url(listener.listening), time.monotonic() - self._began)
            await self._until(asyncio.shield(listener.task), client=client)
            raise PeerError("the HTTP listener has ended")
        except Stopped:
            await self._drain(server, serving.drain_timeout)
        finally:
            await listener.close()
            await asyncio.to_thread(server.options.tracing.close)
            if client.ready.is_set() and client.failure is None:
                client.send(Stop())
                await self._engine.ended(STOP_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, client: EngineClient) -> None:
        """Hands on what the engine says, until it has ended."""
        while (message := await self._engine.receive()) is not None:
            if isinstance(message, Loading):
                client.alive()
                self._advance(message.done, message.total)
            elif isinstance(message, Starting | Refusal):
                client.fail(PeerError(f"the engine said {type(message).__name__} out of turn"))
            else:
                client.deliver(message)
        client.fail(PeerError(self._engine.end()))

    async def _loaded(self, client: EngineClient) -> None:
        with self._progress("loading weights", False) as self._advance:
            while not client.ready.is_set():
                if client.stale:
                    raise DeadlineError(f"loading the model has not moved for {client.age:.0f} s (--watchdog-timeout)")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(client.ready.wait(), 1.0)

    async def _drain(self, server: Server, seconds: float) -> None:
        """Takes nothing new, lets what runs finish within `seconds`, then aborts it."""
        server.draining = True
        if server.running:
            log.info("%d requests run; they have %g s to finish", len(server.running), seconds)
        await self._idle(server, seconds)
        if server.running:
            log.warning("%d requests are aborted", server.abort(None))
            await self._idle(server, ABORT_SECONDS)
        if server.client.failure is not None:
            raise server.client.failure

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


def make_server(starting: Starting, engine: EngineProcess) -> Server:
    """What answers requests, for an engine that starts."""
    config = starting.resolved.config
    metrics = Metrics(config.model.served_name, config.memory.page_size)
    lines = StepLog(config.logging.decode_interval, config.mesh.dp)

    def report(step: StepReport) -> None:
        metrics.step(step)
        lines(step)

    most = config.scheduling.max_running + config.scheduling.max_queued
    client = EngineClient(engine.send, most, config.serving.watchdog_timeout, report)
    options = Options(
        model_path=starting.folder,
        served_model_name=config.model.served_name,
        api_key=config.serving.api_key,
        stream_interval=config.serving.stream_interval,
        watchdog_timeout=config.serving.watchdog_timeout,
        log_requests=config.logging.requests,
        tracing=make_tracing(config.logging.trace, config.logging.collector, "tessera"),
        info={
            "config": config.public(),
            "decisions": [str(decision) for decision in starting.resolved.decisions],
        },
    )
    return Server(client, make_reader(starting), options, metrics)


def make_reader(starting: Starting) -> Reader:
    """What reads requests: the model's tokenizer and template, and its limits. Raises ModelError."""
    config = starting.resolved.config
    folder, tokenizer = Path(starting.folder), config.model.tokenizer_path
    assets = load_assets(
        folder, Path(tokenizer) if tokenizer else None, config.model.chat_template, skip_tokenizer=tokenizer is None
    )
    mesh, most = config.mesh, config.serving.max_body_size
    limits = Limits(config.model.context_length, starting.vocab_size, most, mesh.num_dp, mesh.follows_rooms)
    return Reader(limits, assets.tokenizer, assets.template, assets.sampling_defaults, config.model.seed)
