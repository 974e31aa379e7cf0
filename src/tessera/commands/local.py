"""An engine in this process as a client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tessera.client import Ask, Piece
from tessera.serve.engine import Engine


class LocalClient:
    """Asks an engine in this process, and closes it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def vocab_size(self) -> int | None:
        """That of the model."""
        found = self.engine.info["vocab_size"]
        assert isinstance(found, int)
        return found

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The answer as it comes."""
        text, tokens = ask.text, list(ask.tokens) if ask.tokens is not None else None
        if ask.messages is not None:
            tokens = self.engine.conversation(ask.messages)
        room = self.engine.config.model.context_length - len(tokens or ())
        params: dict[str, Any] = {
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": ask.top_k,
            "ignore_eos": ask.ignore_eos,
            "stop": list(ask.stop),
            **({} if ask.max_tokens is None and room < 1 else {"max_new_tokens": ask.max_tokens or room}),
            **({} if ask.seed is None else {"sampling_seed": ask.seed}),
            **ask.more,
        }
        sent = 0
        bodies = await self.engine.async_generate(text, params, tokens, stream=True)
        async with aclosing(bodies):
            async for body in bodies:
                meta = body["meta_info"]
                new, sent = body["text"][sent:], len(body["text"])
                finish = (meta["finish_reason"] or {}).get("type")
                yield Piece(new, meta["completion_tokens"], meta["prompt_tokens"], finish)

    async def close(self) -> None:
        """Ends the engine."""
        self.engine.close()
