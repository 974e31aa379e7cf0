"""The front's side of the engine: submit requests, receive their outputs, know whether the engine is alive.

Everything here runs on one event loop. `send` hands a message to the engine (over a wire, or in process); `deliver`
takes what comes back. Whoever waits is told when the engine fails, ends or goes silent.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence

from tessera.core.errors import CapacityError, DeadlineError, PeerError, TesseraError
from tessera.core.messages import (
    Abort,
    Fatal,
    FinishReason,
    Inbound,
    Outbound,
    Output,
    Outputs,
    Ready,
    StepReport,
)
from tessera.serve.schema import Item

MAX_PENDING = 1 << 16  # outputs of one stream that nobody has read


class Stream:
    """Outputs of the items of one request. Close it when done: whatever still runs is aborted."""

    def __init__(self, client: EngineClient, items: Sequence[Item]) -> None:
        self._client = client
        self._wake = asyncio.Event()
        self._pending: list[Output] = []
        self._failure: TesseraError | None = None
        self.ids = [uuid.uuid4().hex for _ in items]
        self.index = {request_id: i for i, request_id in enumerate(self.ids)}
        self._open = {(r, c) for r, item in zip(self.ids, items, strict=True) for c in range(item.num_choices)}

    @property
    def open(self) -> bool:
        """Something is still to be read."""
        return bool(self._open or self._pending)

    def put(self, output: Output) -> None:
        """An output from the engine; those of choices that have ended are dropped."""
        key = (output.request_id, output.choice)
        if key not in self._open:
            return
        if output.finish is not None:
            self._open.discard(key)
        self._pending.append(output)
        if len(self._pending) > MAX_PENDING:
            self.fail(CapacityError(f"{MAX_PENDING} outputs wait unread: the client reads too slowly"))
        self._wake.set()

    def fail(self, error: TesseraError) -> None:
        """Whoever reads gets this error, after what has come already."""
        self._failure = self._failure or error
        self._wake.set()

    async def read(self) -> list[Output]:
        """All outputs since the last read, at least one.

        Raises DeadlineError when the engine is silent for too long, PeerError when it has ended.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            self._wake.clear()
            await self._wake.wait()
        found, self._pending = self._pending, []
        return found

    def stop(self, request_id: str, choice: int) -> None:
        """A choice ends here (stop string): the engine is told, later outputs are dropped."""
        if (request_id, choice) in self._open:
            self._open.discard((request_id, choice))
            self._client.send(Abort(request_id, choice, "stop"))

    def abort(self, reason: FinishReason = "abort") -> None:
        """Asks the engine to end everything of this stream; the outputs that say so still come."""
        for request_id in {request_id for request_id, _ in self._open}:
            self._client.send(Abort(request_id, None, reason))

    def close(self) -> None:
        """Ends the stream; what still runs is aborted and nothing more is delivered."""
        self._client.drop(self)
        self.abort()
        self._open.clear()


class EngineClient:
    """Routes outputs to streams. `max_open`: prompts in flight; more are refused. `silence`: see `watch`."""

    def __init__(
        self,
        send: Callable[[Inbound], None],
        max_open: int = 1 << 16,
        silence: float = 300.0,
        on_report: Callable[[StepReport], None] | None = None,
    ) -> None:
        self._send = send
        self._max_open = max_open
        self._silence = silence
        self._on_report = on_report
        self._streams: dict[str, Stream] = {}
        self._seen = time.monotonic()
        self._failure: TesseraError | None = None
        self.ready = asyncio.Event()
        self.failed = asyncio.Event()
        self.info: dict[str, object] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def age(self) -> float:
        """Seconds since the step loop last gave a sign of life."""
        return time.monotonic() - self._seen

    @property
    def stale(self) -> bool:
        """The step loop has been silent for longer than the watchdog allows."""
        return self.age > self._silence

    @property
    def failure(self) -> TesseraError | None:
        """Why the engine has ended, if it has."""
        return self._failure

    def send(self, message: Inbound) -> None:
        """Hands a message to the engine, unless it has ended."""
        if self._failure is None:
            self._send(message)

    def submit(self, items: Sequence[Item]) -> Stream:
        """Starts requests. Raises PeerError when the engine has ended, CapacityError when too many are in flight."""
        if self._failure is not None:
            raise self._failure
        if self.stale:
            raise self._silent()
        if len(self._streams) + len(items) > self._max_open:
            message = f"{len(self._streams)} prompts are in flight, allowed are {self._max_open}; try again later"
            raise CapacityError(message)
        stream = Stream(self, items)
        received = time.time()
        for request_id, item in zip(stream.ids, items, strict=True):
            self._streams[request_id] = stream
            self.send(item.submit(request_id, received))
        return stream

    def alive(self) -> None:
        """The engine gave a sign of life."""
        self._seen = time.monotonic()

    def drop(self, stream: Stream) -> None:
        """Delivers nothing more to a stream."""
        for request_id in stream.ids:
            self._streams.pop(request_id, None)

    def deliver(self, message: Outbound) -> None:
        """A message from the engine. Every one is a sign of life."""
        self.alive()
        if isinstance(message, Outputs):
            for output in message.items:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put(output)
        elif isinstance(message, StepReport):
            if self._on_report is not None:
                self._on_report(message)
        elif isinstance(message, Ready):
            self.info = message.info
            self.ready.set()
        elif isinstance(message, Fatal):
            self.fail(PeerError(f"the engine failed: {message.error}"))

    def fail(self, error: TesseraError) -> None:
        """The engine has ended: everybody who waits, now or later, gets the error. The first reason stays."""
        self._failure = self._failure or error
        self.failed.set()
        self._fail_streams(self._failure)

    async def watch(self, interval: float = 1.0) -> None:
        """Fails what is in flight whenever the engine has been silent for too long. Runs until cancelled."""
        while True:
            await asyncio.sleep(interval)
            if self._streams and self.stale:
                self._fail_streams(self._silent())

    def _silent(self) -> DeadlineError:
        return DeadlineError(f"the engine has not stepped for {self.age:.0f} s (allowed: {self._silence:g} s)")

    def _fail_streams(self, error: TesseraError) -> None:
        for stream in set(self._streams.values()):
            stream.fail(error)
