"""The front's side of the engines: submit requests, receive their outputs, know who is alive.

Everything here runs on one event loop. `send` hands a message to an engine (over a wire, or in process); `deliver`
takes what comes back. Whoever waits is told when his engine fails, ends or goes silent.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence

import msgspec

from tessera.core.errors import CapacityError, PeerError, TesseraError
from tessera.core.messages import Abort, FinishReason, Inbound, Outbound, Output, StepReport, Submit
from tessera.plan.balance import BALANCES, named
from tessera.serve.replica import Replica
from tessera.serve.schema import Item

log = logging.getLogger(__name__)
Send = Callable[[Inbound], None]
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
        if len(self._pending) > MAX_PENDING and self._failure is None:
            self.fail(CapacityError(f"{MAX_PENDING} outputs wait unread: the client reads too slowly"))
            log.warning("a stream failed: %s", self._failure)
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
                raise self._failure.with_traceback(None)  # else that of every reader is kept
            self._wake.clear()
            await self._wake.wait()
        found, self._pending = self._pending, []
        return found

    def stop(self, request_id: str, choice: int) -> None:
        """A choice ends here (stop string): the engine is told, later outputs are dropped."""
        if (request_id, choice) in self._open:
            self._open.discard((request_id, choice))
            self._client.abort(Abort(request_id, choice, "stop"))

    def abort(self, reason: FinishReason = "abort") -> None:
        """Asks the engine to end everything of this stream; the outputs that say so still come."""
        for request_id in {request_id for request_id, _ in self._open}:
            self._client.abort(Abort(request_id, None, reason))

    def close(self) -> None:
        """Ends the stream; what still runs is aborted and nothing more is delivered."""
        self.abort()
        self._client.drop(self)
        self._open.clear()


class EngineClient:
    """Routes requests to engines, and their outputs to streams.

    `sends`: one engine each; of several, `balance` chooses (see `plan/balance.py`), unless a request names one.
    `max_open`: prompts in flight; more are refused. `silence`, `patience`: see `Replica`.
    """

    def __init__(
        self,
        sends: Sequence[Send],
        max_open: int = 1 << 16,
        silence: float = 300.0,
        on_report: Callable[[StepReport], None] | None = None,
        balance: str = "round_robin",
        patience: float | None = None,
    ) -> None:
        names = [f"replica {i}" if len(sends) > 1 else "" for i in range(len(sends))]
        self.replicas = [Replica(i, names[i], send, silence, patience) for i, send in enumerate(sends)]
        self.failure: TesseraError | None = None
        self.failed = asyncio.Event()
        self.on_report = on_report
        self._max_open, self._balance = max_open, balance
        self._homes: dict[str, Replica] = {}

    def __len__(self) -> int:
        return len(self._homes)

    @property
    def age(self) -> float:
        """Seconds since a step loop last gave a sign of life."""
        return min(replica.age for replica in self.replicas)

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken, or None."""
        if self.failure is not None:
            return str(self.failure)
        troubles = [replica.trouble for replica in self.replicas]
        return None if None in troubles else troubles[0]

    def send(self, message: Inbound) -> None:
        """Hands a message to every engine that has not ended."""
        for replica in self.replicas:
            if replica.failure is None:
                replica.send(message)

    def abort(self, message: Abort) -> None:
        """Hands the end of a request to the engine that has it, unless either has ended."""
        home = self._homes.get(message.request_id)
        if home is not None and home.failure is None:
            home.send(message)

    def submit(self, items: Sequence[Item]) -> Stream:
        """Starts requests. Raises PeerError or DeadlineError when their engine has ended or hangs, CapacityError when
        too many are in flight."""
        if self.failure is not None:
            raise self.failure.with_traceback(None)  # else that of every request is kept
        if len(self._homes) + len(items) > self._max_open:
            message = f"{len(self._homes)} prompts are in flight, allowed are {self._max_open}; try again later"
            raise CapacityError(message)
        stream = Stream(self, items)
        try:
            for request_id, item in zip(stream.ids, items, strict=True):
                self._submit(item.submit(request_id), stream)
        except TesseraError:
            stream.close()
            raise
        return stream

    def _submit(self, submit: Submit, stream: Stream) -> None:
        home = self.replicas[0]
        if len(self.replicas) > 1:
            home = self._home(submit)
            submit = msgspec.structs.replace(submit, dp_rank=None)  # there is one in each
        home.submit(submit, stream)
        self._homes[submit.request_id] = home

    def _home(self, submit: Submit) -> Replica:
        """The replica that a request names, or the least loaded of those that take requests."""
        asked = named(self._balance, submit, len(self.replicas))
        if asked is not None:
            return self.replicas[asked]
        loads = [replica.load for replica in self.replicas if replica.trouble is None]
        if not loads:
            raise PeerError(self.trouble or "no replica takes requests")
        return self.replicas[min(loads, key=BALANCES[self._balance]).dp_rank]

    def drop(self, stream: Stream) -> None:
        """Delivers nothing more to a stream."""
        for request_id in stream.ids:
            if (home := self._homes.pop(request_id, None)) is not None:
                home.drop(request_id)

    def deliver(self, message: Outbound, number: int = 0) -> None:
        """A message from an engine."""
        replica = self.replicas[number]
        replica.deliver(message)
        if isinstance(message, StepReport) and self.on_report is not None:
            rank = number if len(self.replicas) > 1 else message.dp_rank
            self.on_report(msgspec.structs.replace(message, dp_rank=rank))

    def lost(self, number: int, error: TesseraError) -> None:
        """An engine has ended: who waits for it gets the error, and nothing runs there any more."""
        self.replicas[number].fail(error)
        if self.on_report is not None:
            self.on_report(StepReport(-1, "IDLE", dp_rank=number))

    def fail(self, error: TesseraError) -> None:
        """All have ended: everybody who waits, now or later, gets the error. The first reason stays."""
        self.failure = self.failure or error
        self.failed.set()
        for replica in self.replicas:
            replica.failure = replica.failure or self.failure
            replica.fail_all(replica.failure)

    async def watch(self, interval: float = 1.0) -> None:
        """Fails what is in flight at engines that have been silent for too long; logs it once for each time that one
        falls silent. Runs until cancelled."""
        hung: set[int] = set()
        while True:
            await asyncio.sleep(interval)
            for replica in self.replicas:
                if not replica.stale:
                    hung.discard(replica.number)
                    continue
                error = replica.silent()
                replica.fail_all(error)
                # One that has ended or still loads is silent too: others tell that.
                if replica.number not in hung and replica.ready.is_set() and replica.failure is None:
                    log.error("%s", error)
                    hung.add(replica.number)
