"""`/v1/completions`, whole and as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.responses import Response

from tessera.core.messages import TokenLogprobs
from tessera.serve.answer import Delta
from tessera.serve.formats import Offsets, completion_logprobs, usage_body
from tessera.serve.http import Call, events, span_of, whole
from tessera.serve.schema import Item, Request
from tessera.serve.server import Server, new_id
from tessera.serve.trace import Span


async def completions(server: Server, call: Call) -> Response:
    """Answers one call."""
    request = server.reader.completion(await server.body(call))
    maker = _Maker(server, request, span_of(call))
    return await (events(call, maker.parts()) if request.stream else whole(call, maker.whole()))


class _Maker:
    """Builds the parts of one answer."""

    def __init__(self, server: Server, request: Request, span: Span) -> None:
        self._answering, self._request = partial(server.answering, span), request
        self._tokenizer = server.reader.tokenizer
        self._id = request.rid or new_id("cmpl")
        self._head = {
            "id": self._id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.options.served_model_name,
        }
        self._offsets: dict[tuple[int, int], Offsets] = {}

    def frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, show: bool = True) -> dict[str, Any]:
        """An answer or a chunk."""
        return {**self._head, "choices": choices, "usage": usage} if show else {**self._head, "choices": choices}

    def choice(self, delta: Delta, first: bool) -> dict[str, Any]:
        """One choice of an answer or a chunk; the first of a choice carries the echo."""
        item = self._request.items[delta.item]
        echo = self._request.echo and first
        before = self._prompt_text(item) if echo else ""
        made: dict[str, Any] = {
            "index": delta.item * item.num_kept + delta.choice,
            "text": before + delta.text,
            "logprobs": self._logprobs(item, delta, echo, before),
            "finish_reason": delta.finish,
            "matched_stop": delta.matched,
        }
        if self._request.token_ids:
            made["token_ids"] = delta.tokens
        return made

    async def whole(self) -> dict[str, Any]:
        """The answer when it is finished."""
        with self._answering(self._request, self._id) as answering:
            answers = await answering.collect()
            choices = [self.choice(delta, first=True) for deltas in answers for delta in deltas]
            return self.frame(choices, usage_body(answering.usage))

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Chunk by chunk."""
        request = self._request
        begun = set()
        with self._answering(request, self._id) as answering:
            async for delta in answering.deltas():
                key = (delta.item, delta.choice)
                usage = usage_body(answering.usage) if request.continuous_usage else None
                show = request.include_usage or request.continuous_usage
                yield self.frame([self.choice(delta, key not in begun)], usage, show)
                begun.add(key)
            if request.include_usage:
                yield self.frame([], usage_body(answering.usage))

    def _prompt_text(self, item: Item) -> str:
        if item.text is not None or self._tokenizer is None:
            return item.text or ""
        return self._tokenizer.decode(item.tokens, item.skip_special)

    def _logprobs(self, item: Item, delta: Delta, echo: bool, before: str) -> dict[str, Any] | None:
        top = self._request.logprobs
        if top < 0:
            return None
        tokens: list[int] = delta.tokens
        entries: list[TokenLogprobs] = delta.logprobs
        if echo and delta.prompt_logprobs is not None:
            tokens, entries = [*item.tokens, *tokens], [*delta.prompt_logprobs, *entries]
        made = Offsets(self._tokenizer, before, item.skip_special)
        offsets = self._offsets.setdefault((delta.item, delta.choice), made)
        return completion_logprobs(self._tokenizer, tokens, entries, top, offsets)
