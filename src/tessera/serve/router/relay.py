"""Answers of servers on their way to the client: whole, or as a stream passed through byte for byte."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Mapping
from functools import partial

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tessera.core.errors import RequestError
from tessera.serve.http import HEADERS, SEND_SECONDS, Call, UnavailableError, client_left, encode, failure, span_of
from tessera.serve.router.connections import Answer
from tessera.serve.router.exchange import Failed, Leg, Parcel, exchange
from tessera.serve.router.rooms import Body, legs, num_prompts, prompt_of
from tessera.serve.router.router import Router
from tessera.serve.router.servers import Role, Use

log = logging.getLogger(__name__)
TRIES = 3  # choices of servers for one request, as long as none of them could be reached
PREFIXES = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl"}  # of ids, as our servers make them
NOT_PASSED = frozenset(
    {"connection", "content-length", "date", "keep-alive", "server", "trailer", "transfer-encoding", "upgrade"}
)
LEFT = 499  # a status for the books: the client had gone
DONE = b"data: [DONE]\n\n"
Raw = list[tuple[bytes, bytes]]


class Relayed(Response):
    """The answer to one call for tokens. Servers are asked when it is sent, so that both end together."""

    def __init__(self, router: Router, call: Call, body: Body) -> None:
        super().__init__()
        self._router, self._call, self._body = router, call, body
        self._span = span_of(call)
        self._path = call.scope["path"]
        self._begun = self._events = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relays, until the end or until the client leaves."""
        work = asyncio.create_task(self._relay(send))
        gone = asyncio.create_task(client_left(receive))
        self._router.running.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if self._ended:  # the client has all; the prefill server may still be saying that it is done
                await asyncio.wait({work})
        finally:
            status = self.status_code if work.done() else LEFT
            for one in (work, gone):
                one.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._router.running.discard(work)
            self._router.metrics.answers.labels(status).inc()

    async def _relay(self, send: Send) -> None:
        try:
            await self._try_all(send)
        except Failed as error:
            await self._fail(send, error.status, error.body)
        except asyncio.CancelledError:
            if self._router.stopping:  # the client is still there
                await self._tell(send, UnavailableError("the router has shut down"))
            raise
        except RequestError as error:
            await self._tell(send, error)
        except Exception as error:
            log.exception("a request failed")
            await self._tell(send, error)

    async def _try_all(self, send: Send) -> None:
        """Tries other servers where those that were chosen could not be reached: nobody has seen the request then."""
        own_id = not (self._body.get("rid") or self._body.get("request_id"))
        missed: frozenset[str] = frozenset()
        for left in reversed(range(TRIES)):
            if own_id:  # servers are asked by it to abort
                self._body["rid"] = f"{PREFIXES.get(self._path, 'gen')}-{uuid.uuid4().hex}"
            uses = self._router.fleet.pick(partial(prompt_of, self._body), num_prompts(self._body), missed)
            try:
                await self._try(uses, send)
                break
            except Failed as error:
                missed |= {error.url}
                # An id of the client's may still be in flight on the other server, which would refuse it.
                if not (error.untaken and left and own_id) or self._router.fleet.trouble(missed):
                    raise

    async def _try(self, uses: Mapping[Role, Use], send: Send) -> None:
        try:
            made = {role: self._leg(uses[role], body) for role, body in self._bodies(uses).items()}
        except RequestError:
            for use in uses.values():
                use.end("cancelled")
            raise
        *_, answering = made.values()

        async def deliver(head: Answer, leg: Leg) -> None:
            await self._deliver(head, leg, send)

        await exchange(answering, made.get("prefill"), deliver)

    def _bodies(self, uses: Mapping[Role, Use]) -> dict[Role, Body]:
        """What each server is sent; the one that answers comes last."""
        if "prefill" not in uses:
            return {"worker": self._body}
        at = uses["prefill"]
        prefill, decode = legs(self._body, at.server.meeting(), at.rank, secrets.randbits)
        return {"prefill": prefill, "decode": decode}

    def _leg(self, use: Use, body: Body) -> Leg:
        router, url = self._router, use.server.url
        headers, span = router.headers(self._call), self._span.child(use.server.address.role)
        parcel = Parcel(self._path, encode(body), {**headers, **span.headers})
        rid = body.get("rid") or body.get("request_id")
        return Leg(router.connections, use, parcel, span, lambda: router.aborts.ask(url, rid, headers))

    async def _deliver(self, head: Answer, leg: Leg, send: Send) -> None:
        raw = [(name, value) for name, value in head.headers.raw if name.lower().decode() not in NOT_PASSED]
        if not head.headers.get("content-type", "").startswith("text/event-stream"):
            await self._whole(send, head.status, await leg.whole(), raw)
            return
        await self._start(send, head.status, raw)
        self._events = True
        async for chunk in leg.chunks():
            await self._part(send, chunk)
        await self._part(send, b"", last=True)

    async def _tell(self, send: Send, error: Exception) -> None:
        answer = failure(error)
        await self._fail(send, answer.status_code, bytes(answer.body))

    async def _fail(self, send: Send, status: int, body: bytes) -> None:
        """Tells the client: as an answer, or as an event where the answer has begun."""
        if not self._begun:
            raw = [(name.encode(), value.encode()) for name, value in HEADERS.get(status, {}).items()]
            await self._whole(send, status, body, [(b"content-type", b"application/json"), *raw])
        elif self._events:
            await self._part(send, b"data: " + body + b"\n\n" + DONE, last=True)

    async def _whole(self, send: Send, status: int, body: bytes, raw: Raw) -> None:
        await self._start(send, status, [*raw, (b"content-length", b"%d" % len(body))])
        await self._part(send, body, last=True)

    async def _start(self, send: Send, status: int, raw: Raw) -> None:
        self._begun, self.status_code = True, status
        raw = [*raw, *((name.encode(), value.encode()) for name, value in self._span.headers.items())]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    async def _part(self, send: Send, body: bytes, last: bool = False) -> None:
        self._ended = last
        async with asyncio.timeout(SEND_SECONDS):  # that a client may leave a stream unread
            await send({"type": "http.response.body", "body": body, "more_body": not last})
