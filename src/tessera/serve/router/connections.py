"""Connections to servers, each for one request at a time.

A pool of httpx looks at all of its connections for every request, which a thousand streams make slow; so each
connection is a transport of its own here, and the free ones of a server lie on a stack.
"""

from __future__ import annotations

import ssl
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping

import httpx

MOST_FREE = 512  # of a server; more are closed
KEEP_SECONDS = 3.0  # that a free one is used again: many servers close theirs after 5 (uvicorn's default)
STALE_SECONDS = 1.0  # within which a request learns that its connection had been closed meanwhile
STALE = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
CONNECT_SECONDS = 5.0


class Connections:
    """Sends requests. `silence`: seconds that a server may let a request wait for its next byte."""

    def __init__(self, silence: float) -> None:
        self._timeout = httpx.Timeout(silence, connect=CONNECT_SECONDS, pool=None).as_dict()
        self._free: defaultdict[str, list[httpx.AsyncHTTPTransport]] = defaultdict(list)
        self._tls: ssl.SSLContext | None = None

    async def send(self, server: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POSTs to a server, named by its URL; returns once the head of the answer is there. Raises httpx.HTTPError."""
        request = httpx.Request(
            "POST",
            server + path,
            content=body,
            headers={"accept-encoding": "identity", **headers},  # bytes are passed on as they come
            extensions={"timeout": self._timeout},
        )
        free, began = self._free[server], time.monotonic()
        if not free:
            return await self._try(self._make(server), request, free)
        try:
            return await self._try(free.pop(), request, free)
        except STALE as error:
            if time.monotonic() - began > STALE_SECONDS:
                raise
            try:
                return await self._try(self._make(server), request, free)
            except httpx.ConnectError:
                raise error from None  # it may have had the request, and have died of it: nobody else shall

    async def _try(
        self, transport: httpx.AsyncHTTPTransport, request: httpx.Request, free: list[httpx.AsyncHTTPTransport]
    ) -> Answer:
        try:
            return Answer(await transport.handle_async_request(request), transport, free)
        except BaseException:
            await transport.aclose()
            raise

    def _make(self, server: str) -> httpx.AsyncHTTPTransport:
        if server.startswith("https:") and self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_SECONDS)
        return httpx.AsyncHTTPTransport(verify=self._tls or False, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Closes the free ones."""
        for free in self._free.values():
            while free:
                await free.pop().aclose()


class Answer:
    """The answer to a request: its head, and a body to read once. `close` ends both."""

    def __init__(
        self, response: httpx.Response, transport: httpx.AsyncHTTPTransport, free: list[httpx.AsyncHTTPTransport]
    ) -> None:
        self.status, self.headers = response.status_code, response.headers
        self._response, self._transport, self._free = response, transport, free
        self._read = False

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body, as it comes. Raises httpx.HTTPError."""
        stream = self._response.stream
        assert isinstance(stream, httpx.AsyncByteStream), "an asynchronous transport made it"
        async for chunk in stream:
            yield chunk
        self._read = True

    async def close(self) -> None:
        """Gives the connection back where all was read, else closes it: the server sees that nobody reads any more."""
        stream = self._response.stream
        assert isinstance(stream, httpx.AsyncByteStream), "an asynchronous transport made it"
        await stream.aclose()
        if self._read and len(self._free) < MOST_FREE:
            self._free.append(self._transport)
        else:
            await self._transport.aclose()
