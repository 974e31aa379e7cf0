"""A client that answers from a script, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tessera.client import Ask, Piece


class Scripted:
    """`say(ask)` gives the answer's pieces of text, one token each; an exception in it is raised in its place."""

    def __init__(self, say: Callable[[Ask], list[str | Exception]], pause: float = 0.0) -> None:
        self._say, self._pause = say, pause
        self.asked: list[Ask] = []
        self.running = self.most = self.stopped = 0

    async def vocab_size(self) -> int | None:
        return 100

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        self.asked.append(ask)
        self.running += 1
        self.most = max(self.most, self.running)
        whole = False
        try:
            pieces = self._say(ask)
            for count, text in enumerate(pieces, 1):
                await asyncio.sleep(self._pause)
                if isinstance(text, Exception):
                    raise text
                yield Piece(text, count, 7, "stop" if count == len(pieces) else None)
            whole = True
        finally:
            self.running -= 1
            self.stopped += not whole

    async def close(self) -> None:
        """It holds nothing."""
