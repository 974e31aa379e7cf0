"""What our endpoints need beside Starlette: bodies with a limit, events, leaving clients, errors in OpenAI's form.

Every error, whoever finds it, goes out as {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tessera.core.errors import CapacityError, DeadlineError, PeerError, RequestError, TesseraError
from tessera.serve.trace import Span

log = logging.getLogger(__name__)
T = TypeVar("T")
Call = Request  # of HTTP; a `schema.Request` is what its body asks for

BODY_SECONDS = 60.0  # without any more of a body that was announced
SEND_SECONDS = 300.0  # that a client may leave a stream unread
encode = msgspec.json.Encoder().encode
TYPES = {401: "authentication_error", 404: "not_found_error", 503: "unavailable_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 503: "unavailable"}
HEADERS = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}
UNAVAILABLE = (CapacityError, DeadlineError, PeerError)


class UnavailableError(RequestError):
    """The server cannot take a request now (HTTP 503)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, None, 503)


class Json(Response):
    """A whole answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return encode(content)


class Events(StreamingResponse):
    """Server-sent events: `first`, then what `payloads` yields. `payloads` is closed however the answer ends."""

    media_type = "text/event-stream"

    def __init__(self, first: Any, payloads: AsyncGenerator[Any, None]) -> None:
        self._payloads, self._events = payloads, _events(first, payloads)
        super().__init__(self._events, headers={"cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        async with aclosing(self._payloads), aclosing(self._events):
            with suppress(TimeoutError):  # of the client; errors of `payloads` are events
                await super().__call__(scope, receive, send_in_time)


async def _events(first: Any, payloads: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    yield b"data: " + encode(first) + b"\n\n"
    try:
        async for payload in payloads:
            yield b"data: " + encode(payload) + b"\n\n"
    except Exception as error:
        if not isinstance(error, TesseraError):  # told to its client; an engine's end is logged once, where it is found
            log.exception("a stream failed")
        yield b"data: " + bytes(failure(error).body) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def events(call: Call, payloads: AsyncGenerator[Any, None]) -> Events:
    """An answer that begins with the first payload: what fails before has a status of its own."""
    return Events(await while_connected(call, anext(payloads)), payloads)


async def whole(call: Call, work: Awaitable[Any]) -> Json:
    """An answer in one piece."""
    return Json(await while_connected(call, work))


async def while_connected(call: Call, work: Awaitable[T]) -> T:
    """Runs `work`; cancels it and raises ClientDisconnect when the client goes. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(client_left(call.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def client_left(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def span_of(call: Call) -> Span:
    """What a call is in its trace (see `trace.Traced`)."""
    span: Span = call.scope["state"]["span"]
    return span


async def read_body(call: Call, limit: int) -> bytes:
    """The body of a call. One over `limit` bytes is refused (413) without being kept."""
    announced = call.headers.get("content-length", "")
    body, found = bytearray(), int(announced) if announced.isdigit() else 0
    try:
        async with asyncio.timeout(BODY_SECONDS) as deadline, aclosing(call.stream()) as parts:
            while found <= limit and (part := await anext(parts, b"")):
                deadline.reschedule(asyncio.get_running_loop().time() + BODY_SECONDS)
                body += part
                found = max(found, len(body))
    except TimeoutError:
        raise RequestError(f"nothing of the body came for {BODY_SECONDS:g} s", "body", 408) from None
    if found > limit:
        raise RequestError(f"the body has {found} bytes or more, allowed are {limit} (--max-body-size)", "body", 413)
    return bytes(body)


async def read_json(call: Call, limit: int, empty: Any = None) -> Any:
    """The body as JSON (see `read_body`); `empty`: what no body stands for, where one may be left out."""
    body = await read_body(call, limit)
    if not body:
        if empty is None:
            raise RequestError("the body is empty, expected a JSON object", "body")
        return empty
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", "body") from error


def failure(error: Exception) -> Json:
    """An exception as an answer; those that are our own fault say nothing of their inside."""
    if isinstance(error, RequestError):
        return refusal(error.status, str(error), error.field, error.code)
    if isinstance(error, UNAVAILABLE):
        return refusal(503, str(error))
    return refusal(500, f"internal error ({type(error).__name__}); the server's log has the details")


def refusal(status: int, message: str, field: str | None = None, code: str | None = None) -> Json:
    """An error as an answer."""
    return Json(error_body(status, message, field, code), status, HEADERS.get(status))


def error_body(status: int, message: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code or CODES.get(status)}}
