"""Calls of `/generate` on an engine in this process: read in the caller's thread, answered on the engine's loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from tessera.core.errors import PeerError
from tessera.serve.answer import Answering
from tessera.serve.local import LocalEngine, wait_for
from tessera.serve.native_body import Asked, Body
from tessera.serve.schema import Reader, Request

Answer = Body | list[Body]


class Calls:
    """Bodies in, answers out. Every method may be called from any thread. `interval`: tokens between two parts."""

    def __init__(self, local: LocalEngine, reader: Reader, interval: int) -> None:
        self._local, self._reader, self._interval = local, reader, interval

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant is to go on with. Raises RequestError."""
        given: Any = messages
        if isinstance(given, Sequence) and not isinstance(given, str | bytes):
            given = [dict(one) if isinstance(one, Mapping) else one for one in given]
        return self._reader.conversation({"messages": given})[0]

    def answer(self, body: dict[str, Any]) -> Future[Answer]:
        """The finished answer. Cancelling the future ends the request. Raises RequestError at once."""
        return self._local.submit(Asked(self._reader, body, self._begin).whole)

    def iterate(self, body: dict[str, Any]) -> Iterator[Body]:
        """Growing answers. Closing or dropping the iterator ends the request. Raises RequestError at once."""
        return self._iterate(self._source(body))

    def _iterate(self, source: _Source) -> Iterator[Body]:
        try:
            while (part := wait_for(source.next())) is not None:
                yield part
        finally:
            source.close()

    def aiterate(self, body: dict[str, Any]) -> AsyncIterator[Body]:
        """`iterate` for another event loop."""
        return self._aiterate(self._source(body))

    async def _aiterate(self, source: _Source) -> AsyncIterator[Body]:
        try:
            while (part := await asyncio.wrap_future(source.next())) is not None:
                yield part
        finally:
            source.close()

    def _source(self, body: dict[str, Any]) -> _Source:
        return _Source(self._local, Asked(self._reader, body, self._begin).parts())

    def _begin(self, request: Request, rid: str) -> Answering:
        return Answering(self._local.client, self._reader.tokenizer, request.items, self._interval)


class _Source:
    """An asynchronous generator of the engine's loop, read from elsewhere."""

    def __init__(self, local: LocalEngine, generator: AsyncGenerator[Body, None]) -> None:
        self._local, self._generator = local, generator
        self._turn = asyncio.Lock()  # a read that was cancelled may still be cleaning up when `close` comes

    def next(self) -> Future[Body | None]:
        """The next part; None at the end."""

        async def work() -> Body | None:
            async with self._turn:
                return await anext(self._generator, None)

        return self._local.submit(work)

    def close(self) -> None:
        """Ends what it asked for. Waits for nothing: the garbage collector calls this, too, and from any thread."""

        async def work() -> None:
            async with self._turn:
                await self._generator.aclose()

        with suppress(PeerError):  # closed already
            self._local.submit(work)
