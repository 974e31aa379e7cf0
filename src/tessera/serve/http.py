"""HTTP without a framework: a call (read the body, answer, stream events, notice the client leaving) and its errors.

Bare ASGI: bodies are checked by our own tables and answers are built by msgspec, so a framework would only add cost.
Every error, whoever finds it, goes out in OpenAI's form: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec

from tessera.core.errors import CapacityError, DeadlineError, PeerError, RequestError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[str, str]]
T = TypeVar("T")

JSON = "application/json"
BODY_SECONDS = 60.0  # without any more of a body that was announced
SEND_SECONDS = 300.0  # that a client may leave an answer unread
encode = msgspec.json.Encoder().encode
STATUS_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}
UNAVAILABLE = (CapacityError, DeadlineError, PeerError)


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""


class UnavailableError(RequestError):
    """The server cannot take a request now (HTTP 503)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, None, 503)


def error_body(status: int, message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    default = "invalid_request_error" if status < 500 else "server_error"
    kind = STATUS_TYPES.get(status, default)
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an exception; those that are our own fault say nothing of their inside."""
    if isinstance(error, RequestError):
        code = {404: "not_found", 401: "invalid_api_key", 503: "unavailable"}.get(error.status)
        return error.status, error_body(error.status, str(error), error.field, code)
    if isinstance(error, UNAVAILABLE):
        return 503, error_body(503, str(error), code="unavailable")
    return 500, error_body(500, f"internal error ({type(error).__name__}); the server's log has the details")


class Call:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.status: int | None = None  # of the answer, once it has begun
        self._receive = receive
        self._send = send

    async def json(self, limit: int) -> Any:
        """The body as JSON. A body over `limit` bytes is refused without being kept."""
        announced = self.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise too_large(int(announced), limit)
        body = bytearray()
        more = True
        while more:
            try:
                message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
            except TimeoutError:
                raise RequestError(f"nothing of the body came for {BODY_SECONDS:g} s", "body", 408) from None
            if message["type"] == "http.disconnect":
                raise Disconnected
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise too_large(len(body), limit)
        try:
            return msgspec.json.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is not valid JSON: {error}", "body") from error

    async def reply(self, status: int, payload: Any, headers: Headers = (), kind: str = JSON) -> None:
        """The whole answer: bytes as they are, anything else as JSON."""
        body = payload if isinstance(payload, bytes) else encode(payload)
        await self._start(status, [("content-type", kind), ("content-length", str(len(body))), *headers])
        await self._body(body)

    async def fail(self, error: Exception) -> None:
        """An error as the answer, or as an event where a stream has begun."""
        status, payload = error_of(error)
        if self.status is not None:
            await self.event(payload)
            await self.end_events()
            return
        more = {401: [("www-authenticate", "Bearer")], 503: [("retry-after", "1")]}.get(status, [])
        allow = [("allow", error.allow)] if isinstance(error, MethodError) else []
        await self.reply(status, payload, [*more, *allow])

    async def event(self, payload: Any) -> None:
        """One server-sent event; the first one begins the answer."""
        if self.status is None:
            await self._start(
                200, [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]
            )
        await self._body(b"data: " + encode(payload) + b"\n\n", more=True)

    async def end_events(self) -> None:
        """The end of a stream, as OpenAI marks it."""
        await self._body(b"data: [DONE]\n\n")

    async def _start(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.status = status
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, data: bytes, more: bool = False) -> None:
        """A part of the answer; waits while the client leaves too much unread, up to a deadline."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise Disconnected from None

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work`; cancels it and raises Disconnected when the client goes. The body must have been read."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Disconnected
            return task.result()
        finally:
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class MethodError(RequestError):
    """The path is known, the method is not (HTTP 405)."""

    def __init__(self, call: Call, methods: Iterable[str]) -> None:
        self.allow = ", ".join(sorted(methods))
        super().__init__(f"{call.method} {call.path[:100]} is not served; allowed: {self.allow}", None, 405)


def too_large(found: int, limit: int) -> RequestError:
    """The error for a body over the limit (HTTP 413)."""
    return RequestError(f"the body has {found} bytes or more, allowed are {limit} (--max-body-size)", "body", 413)
