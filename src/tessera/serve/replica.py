"""One engine as the front sees it: what it runs, how much that is, and whether it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from tessera.core.errors import DeadlineError, PeerError, TesseraError
from tessera.core.messages import (
    EndProfile,
    Fatal,
    Inbound,
    Outbound,
    Output,
    Outputs,
    Profile,
    Profiled,
    Ready,
    Submit,
)
from tessera.plan.balance import Load


class Sink(Protocol):
    """Who waits for outputs."""

    def put(self, output: Output) -> None:
        """An output came."""

    def fail(self, error: TesseraError) -> None:
        """No more will come."""


class Replica:
    """`number`: among those of one front; `name`: for people, where there are several. `send`: hands a message to the
    engine. `silence`: seconds without a sign of life after which it counts as hung, `patience`: while it starts.
    `ready`: it can run; `warm`: a real generation went through."""

    def __init__(
        self, number: int, name: str, send: Callable[[Inbound], None], silence: float, patience: float | None = None
    ) -> None:
        self.number, self.name, self.send, self.silence = number, name, send, silence
        self.patience = silence if patience is None else patience
        self.load = Load(number)
        self.info: dict[str, object] = {}
        self.first_s = 0.0  # what the first token took
        self.failure: TesseraError | None = None
        self.ready, self.warm = asyncio.Event(), asyncio.Event()
        self._sinks: dict[str, tuple[Sink, int]] = {}
        self._asked: dict[str, asyncio.Future[Profiled]] = {}
        self._open: dict[str, int] = {}  # choices that have not ended
        self._seen = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the step loop last gave a sign of life."""
        return time.monotonic() - self._seen

    @property
    def allowed(self) -> float:
        """Seconds that it may be silent now."""
        return self.silence if self.warm.is_set() else self.patience

    @property
    def stale(self) -> bool:
        """It has been silent for longer than is allowed."""
        return self.age > self.allowed

    @property
    def trouble(self) -> str | None:
        """Why it takes no requests, or None."""
        if self.failure is not None:
            return str(self.failure)
        if not self.warm.is_set():
            return self._named("the model is being loaded")
        if self.stale:
            return self._named(f"the step loop has not ticked for {self.age:.1f} s (allowed: {self.allowed:g} s)")
        return None

    def _named(self, text: str) -> str:
        return f"{self.name}: {text}" if self.name else text

    def silent(self) -> DeadlineError:
        """The error of who waits for an engine that hangs."""
        serves = self.ready.is_set() or self.warm.is_set()
        what = "the engine has not stepped" if serves else "loading the model has not moved"
        flag = "" if serves else "; --watchdog-timeout"
        return DeadlineError(self._named(f"{what} for {self.age:.0f} s (allowed: {self.allowed:g} s{flag})"))

    def submit(self, submit: Submit, sink: Sink) -> None:
        """Starts a request. Raises why it cannot."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)  # else that of every request is kept
        if self.stale:
            raise self.silent()
        tokens = len(submit.tokens) + submit.params.max_new_tokens
        self._sinks[submit.request_id] = sink, tokens * submit.n
        self._open[submit.request_id] = submit.n
        self.load.num_taken += 1
        self.load.num_requests += submit.n
        self.load.num_tokens += tokens * submit.n
        self.send(submit)

    def ask(self, message: Profile | EndProfile) -> asyncio.Future[Profiled]:
        """Asks the engine something; what it answers. Needs a running event loop. Fails when the engine does."""
        answer = asyncio.get_running_loop().create_future()
        self._asked[message.id] = answer
        answer.add_done_callback(lambda _: self._asked.pop(message.id, None))
        self.send(message)
        return answer

    def drop(self, request_id: str) -> None:
        """Delivers nothing more of a request."""
        _, tokens = self._sinks.pop(request_id, (None, 0))
        self.load.num_requests -= self._open.pop(request_id, 0)
        self.load.num_tokens -= tokens

    def alive(self) -> None:
        """It gave a sign of life."""
        self._seen = time.monotonic()

    def deliver(self, message: Outbound) -> None:
        """A message of the engine. Every one is a sign of life."""
        self.alive()
        if isinstance(message, Outputs):
            for output in message.items:
                self._put(output)
        elif isinstance(message, Ready):
            self.info = message.info
            self.ready.set()
        elif isinstance(message, Profiled):
            if (answer := self._asked.get(message.id)) is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Fatal):
            self.fail(PeerError(f"the engine failed: {message.error}"))

    def _put(self, output: Output) -> None:
        sink, _ = self._sinks.get(output.request_id, (None, 0))
        if sink is None:
            return
        if output.finish is not None:
            self._open[output.request_id] -= 1
            self.load.num_requests -= 1
        sink.put(output)

    def fail(self, error: TesseraError) -> None:
        """It has ended: everybody who waits gets the error, and who comes later. The first reason stays."""
        if self.failure is None:
            self.failure = type(error)(self._named(str(error)))
        self.fail_all(self.failure)

    def give_up(self) -> None:
        """It hangs, and counts as ended."""
        self.failure = self.failure or self.silent()
        self.fail_all(self.failure)

    def fail_all(self, error: TesseraError) -> None:
        """Everybody who waits gets the error."""
        for sink, _ in list(self._sinks.values()):
            sink.fail(error)
        for answer in list(self._asked.values()):
            if not answer.done():
                answer.set_exception(error)

    def renew(self, send: Callable[[Inbound], None]) -> None:
        """Another engine takes its place, and will say when it is ready."""
        self.send, self.failure, self.info = send, None, {}
        self.ready.clear()
        self.warm.clear()
        self.alive()
