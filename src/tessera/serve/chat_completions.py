"""`/v1/chat/completions`, whole and as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from starlette.responses import Response

from tessera.serve.answer import Delta
from tessera.serve.formats import chat_logprobs, usage_body
from tessera.serve.http import Call, events, span_of, whole
from tessera.serve.schema import Request
from tessera.serve.server import Server, new_id
from tessera.serve.trace import Span


async def chat_completions(server: Server, call: Call) -> Response:
    """Answers one call."""
    request = server.reader.chat(await server.body(call))
    maker = _Maker(server, request, span_of(call))
    return await (events(call, maker.parts()) if request.stream else whole(call, maker.whole()))


class _Maker:
    """Builds the parts of one answer."""

    def __init__(self, server: Server, request: Request, span: Span) -> None:
        self._answering, self._request = partial(server.answering, span), request
        self._tokenizer = server.reader.tokenizer
        self._id = request.rid or new_id("chatcmpl")
        self._created, self._model = int(time.time()), server.options.served_model_name

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def whole(self) -> dict[str, Any]:
        """The answer when it is finished."""
        with self._answering(self._request, self._id) as answering:
            (answer,) = await answering.collect()
            choices = [
                self._choice(one, {"message": {"role": "assistant", "content": one.text, "refusal": None}})
                for one in answer
            ]
            return {**self._head("chat.completion"), "choices": choices, "usage": usage_body(answering.usage)}

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Chunk by chunk; the first of each choice says whose turn it is."""
        request = self._request
        head = self._head("chat.completion.chunk")
        begun: set[int] = set()
        with self._answering(request, self._id) as answering:
            async for delta in answering.deltas():
                more: dict[str, Any] = {}
                if request.continuous_usage:
                    more["usage"] = usage_body(answering.usage)
                elif request.include_usage:
                    more["usage"] = None
                if delta.choice not in begun:
                    begun.add(delta.choice)
                    start = {"role": "assistant", "content": ""}
                    opening = {"index": delta.choice, "delta": start, "logprobs": None, "finish_reason": None}
                    yield {**head, "choices": [opening], **more}
                content = {"content": delta.text} if delta.text else {}
                yield {**head, "choices": [self._choice(delta, {"delta": content})], **more}
            if request.include_usage:
                yield {**head, "choices": [], "usage": usage_body(answering.usage)}

    def _choice(self, delta: Delta, words: dict[str, Any]) -> dict[str, Any]:
        top = self._request.logprobs
        made = {
            "index": delta.choice,
            **words,
            "logprobs": chat_logprobs(self._tokenizer, delta.tokens, delta.logprobs, top) if top >= 0 else None,
            "finish_reason": delta.finish,
            "matched_stop": delta.matched,
        }
        return {**made, "token_ids": delta.tokens} if self._request.token_ids else made
