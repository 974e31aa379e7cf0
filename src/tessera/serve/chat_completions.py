"""`/v1/chat/completions`, whole and as a stream."""

from __future__ import annotations

import time
from typing import Any

from tessera.serve.answer import Answering, Delta
from tessera.serve.formats import chat_logprobs, usage_body
from tessera.serve.http import Call
from tessera.serve.schema import Request
from tessera.serve.server import Server, new_id


async def chat_completions(server: Server, call: Call) -> None:
    """Answers one call."""
    request = server.reader.chat(await server.body(call))
    await call.while_connected(_answer(server, call, request))


async def _answer(server: Server, call: Call, request: Request) -> None:
    rid = request.rid or new_id("chatcmpl")
    maker = _Maker(server, request, rid)
    with server.answering(request, rid) as answering:
        if request.stream:
            await maker.stream(call, answering)
            return
        (answer,) = await answering.collect()
        await call.reply(200, maker.whole(answer, usage_body(answering.usage)))


class _Maker:
    """Builds the parts of one answer."""

    def __init__(self, server: Server, request: Request, rid: str) -> None:
        self._tokenizer = server.reader.tokenizer
        self._request = request
        self._id, self._created, self._model = rid, int(time.time()), server.options.served_model_name

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, answer: list[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        choices = [
            self._choice(one, {"message": {"role": "assistant", "content": one.text, "refusal": None}})
            for one in answer
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    async def stream(self, call: Call, answering: Answering) -> None:
        """Chunk by chunk; the first of each choice says whose turn it is."""
        request = self._request
        head = self._head("chat.completion.chunk")
        begun: set[int] = set()
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
                await call.event({**head, "choices": [opening], **more})
            content = {"content": delta.text} if delta.text else {}
            await call.event({**head, "choices": [self._choice(delta, {"delta": content})], **more})
        if request.include_usage:
            await call.event({**head, "choices": [], "usage": usage_body(answering.usage)})
        await call.end_events()

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
