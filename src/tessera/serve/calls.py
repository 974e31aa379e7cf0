"""Calls of `/generate` on an engine in this process: read in the caller's thread, answered on the engine's loop."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, contextmanager, suppress
from typing import Any

from tessera.core.errors import PeerError
from tessera.serve.answer import Answering
from tessera.serve.local import LocalEngine, wait_for
from tessera.serve.native_body import Body, Maker, is_single, parts, whole
from tessera.serve.schema import Reader, Request

Answer = Body | list[Body]
Asked = Request | list[Request]


class Calls:
    """Bodies in, answers out. Every method may be called from any thread. `interval`: tokens between two parts."""

    def __init__(self, local: LocalEngine, reader: Reader, interval: int) -> None:
        self._local, self._reader, self._interval = local, reader, interval

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant is to go on with. Raises RequestError."""
        return self._reader.conversation({"messages": [dict(message) for message in messages]})[0]

    def answer(self, body: dict[str, Any]) -> Future[Answer]:
        """The finished answer. Cancelling the future ends the request. Raises RequestError at once."""
        asked, named = self._read(body)

        async def work() -> Answer:
            with self._makers(asked, named) as makers:
                return await whole(makers, is_single(asked))

        return self._local.submit(work)

    def iterate(self, body: dict[str, Any]) -> Iterator[Body]:
        """Growing answers. Closing or dropping the iterator ends the request. Raises RequestError at once."""
        return self._iterate(_Source(self._local, self._parts(*self._read(body))))

    def _iterate(self, source: _Source) -> Iterator[Body]:
        try:
            while (part := wait_for(source.next())) is not None:
                yield part
        finally:
            source.close()

    def aiterate(self, body: dict[str, Any]) -> AsyncIterator[Body]:
        """`iterate` for another event loop."""
        return self._aiterate(_Source(self._local, self._parts(*self._read(body))))

    async def _aiterate(self, source: _Source) -> AsyncIterator[Body]:
        try:
            while (part := await asyncio.wrap_future(source.next())) is not None:
                yield part
        finally:
            source.close()

    def _read(self, body: dict[str, Any]) -> tuple[Asked, bool]:
        return self._reader.generate(body), bool(body.get("return_text_in_logprobs"))

    async def _parts(self, asked: Asked, named: bool) -> AsyncGenerator[Body, None]:
        with self._makers(asked, named) as makers:
            async with aclosing(parts(makers, is_single(asked))) as growing:
                async for part in growing:
                    yield part

    @contextmanager
    def _makers(self, asked: Asked, named: bool) -> Iterator[list[Maker]]:
        """Submits the requests; leaving aborts what still runs of them."""
        tokenizer = self._reader.tokenizer
        with ExitStack() as stack:
            makers = []
            for request in asked if isinstance(asked, list) else [asked]:
                answering = Answering(self._local.client, tokenizer, request.items, self._interval)
                rid = request.rid or f"gen-{uuid.uuid4().hex}"
                makers.append(Maker(tokenizer, request, rid, stack.enter_context(answering), named))
            yield makers


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
