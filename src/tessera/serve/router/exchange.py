"""One request on its way: one leg to a server, or two that belong together, and what becomes of the other if one fails.

A pair is dispatched whole or not at all. The prefill server's answer is read and dropped, the decode server's goes to
the client. The first leg that fails ends the other at once: its connection is closed, and its server is asked to abort
the request, since not every server notices that somebody left.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from tessera.serve.http import encode, refusal
from tessera.serve.router.connections import Answer, Connections
from tessera.serve.router.servers import Outcome, Use
from tessera.serve.trace import Span

log = logging.getLogger(__name__)
GRACE_SECONDS = 5.0  # for the prefill server's answer, once the decode server's is whole
ABORT_SECONDS = 5.0
MOST_ABORTS = 64  # ids of a batch that are aborted by name; connections are closed all the same
ERROR_BODY = 1 << 20


class Failed(Exception):
    """The leg to `url` failed. `status`, `body`: for the client. `untaken`: the server has not seen the request."""

    def __init__(self, url: str, what: str, status: int, body: bytes | None = None, untaken: bool = False) -> None:
        super().__init__(f"{url} {what}")
        self.url, self.status, self.untaken = url, status, untaken
        self.body = bytes(refusal(status, str(self)).body) if body is None else body


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a server is sent."""

    path: str
    body: bytes
    headers: Mapping[str, str]


class Leg:
    """One request to one server. Used as a context: however it ends, the connection and the server's claim end too.

    `abort` asks the server to end the request.
    """

    def __init__(
        self, connections: Connections, use: Use, parcel: Parcel, span: Span, abort: Callable[[], None]
    ) -> None:
        self._connections, self._use, self._parcel = connections, use, parcel
        self._span, self._abort = span, abort
        self._answer: Answer | None = None
        self._sent = self._whole = False

    async def open(self) -> Answer:
        """The head of a good answer. Raises Failed."""
        parcel = self._parcel
        try:
            self._sent = True
            answer = await self._connections.send(self._use.server.url, parcel.path, parcel.body, parcel.headers)
            self._answer = answer
            if answer.status >= 400:
                raise self._refused(answer.status, await _most(answer))
        except httpx.HTTPError as error:
            raise self._broken(error) from error
        self._use.answered()
        return answer

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body of the answer, as it comes. Raises Failed."""
        assert self._answer is not None, "open() comes first"
        try:
            async for chunk in self._answer.chunks():
                yield chunk
        except httpx.HTTPError as error:
            raise self._broken(error) from error
        self._whole = True
        self._use.end("ok")

    async def whole(self) -> bytes:
        """The whole body. Raises Failed."""
        return b"".join([chunk async for chunk in self.chunks()])

    def _refused(self, status: int, body: bytes) -> Failed:
        self._whole = True
        outcome: Outcome = "failed" if status >= 500 else "refused"
        self._use.end(outcome, f"status {status}")
        return Failed(self._use.server.url, f"answered with status {status}", status, body)

    def _broken(self, error: httpx.HTTPError) -> Failed:
        late = isinstance(error, httpx.TimeoutException)
        untaken = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        self._sent = self._sent and not untaken
        why = f"{type(error).__name__} {error}".strip()
        self._use.end("timeout" if late else "failed", why)
        server = self._use.server
        what = "was silent for too long" if late else "cannot be reached or broke off"
        log.warning("%s %s %s: %s", server.address.role, server.url, what, why)
        return Failed(server.url, f"{what} ({why})", 504 if late and not untaken else 502, untaken=untaken)

    async def __aenter__(self) -> Leg:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._use.end("cancelled")
        self._span.end(self._answer.status if self._whole and self._answer is not None else None)
        if self._sent and not self._whole:
            self._abort()
        if self._answer is not None:
            await self._answer.close()


async def _most(answer: Answer) -> bytes:
    """The body of a refusal, or as much of it as is of use."""
    body = bytearray()
    async for chunk in answer.chunks():
        body += chunk
        if len(body) > ERROR_BODY:
            break
    return bytes(body)


Deliver = Callable[[Answer, Leg], Awaitable[None]]


async def exchange(answering: Leg, ahead: Leg | None, deliver: Deliver) -> None:
    """Runs a request: `deliver` gets the head of `answering`'s answer and reads the rest of it.

    Raises the first `Failed` of either leg; by then both have ended. Cancelling ends both.
    """
    failures: list[Failed] = []
    try:
        async with asyncio.TaskGroup() as group:
            filling = None if ahead is None else group.create_task(_noted(_fill(ahead), failures))
            await _noted(_answer(answering, deliver), failures)
            if filling is not None and not filling.done():
                await asyncio.wait({filling}, timeout=GRACE_SECONDS)
                filling.cancel()
    except ExceptionGroup as errors:
        _, others = errors.split(Failed)
        raise others.exceptions[0] if others is not None else failures[0] from None


async def _noted(work: Awaitable[None], failures: list[Failed]) -> None:
    try:
        await work
    except Failed as failure:
        failures.append(failure)
        raise


async def _fill(ahead: Leg) -> None:
    async with ahead:
        await ahead.open()
        await ahead.whole()


async def _answer(answering: Leg, deliver: Deliver) -> None:
    async with answering:
        await deliver(await answering.open(), answering)


class Aborts:
    """Calls of `/abort_request` that nobody waits for, each with a deadline."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._running: set[asyncio.Task[None]] = set()

    def ask(self, url: str, rid: object, headers: dict[str, str]) -> None:
        """Asks a server to end a request, or those of a batch."""
        ids: list[Any] = rid[:MOST_ABORTS] if isinstance(rid, list) else [rid]
        task = asyncio.create_task(self._all(url, ids, headers))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _all(self, url: str, ids: list[Any], headers: dict[str, str]) -> None:
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                for one in ids:
                    body = encode({"rid": one, "abort_all": False})
                    await self._http.post(f"{url}/abort_request", content=body, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            log.info("%s could not be asked to abort a request: %s", url, type(error).__name__)

    async def settled(self) -> None:
        """Waits for those under way."""
        await asyncio.gather(*self._running)
