"""`/generate`: SGLang's native endpoint. Streams carry the whole text so far, as its clients expect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tessera.core.messages import TokenLogprobs
from tessera.serve.answer import Answering, Delta
from tessera.serve.formats import finite, namer
from tessera.serve.http import Call
from tessera.serve.merge import merged
from tessera.serve.schema import Request
from tessera.serve.server import Server, new_id


async def generate(server: Server, call: Call) -> None:
    """Answers one call: an object for one prompt and choice, else a list."""
    body = await server.body(call)
    request = server.reader.generate(body)
    named = isinstance(body, dict) and bool(body.get("return_text_in_logprobs"))
    await call.while_connected(_answer(server, call, request, named))


async def _answer(server: Server, call: Call, asked: Request | list[Request], named: bool) -> None:
    requests = asked if isinstance(asked, list) else [asked]
    single = not isinstance(asked, list) and asked.items[0].num_kept == 1
    with ExitStack() as stack:
        makers = []
        for request in requests:
            rid = request.rid or new_id("gen")
            answering = stack.enter_context(server.answering(request, rid))
            makers.append(_Maker(server, request, rid, answering, named))
        if requests[0].stream:
            await _stream(call, makers, single)
            return
        found = await asyncio.gather(*(maker.answering.collect() for maker in makers))
        answers = [maker.body(delta) for maker, (deltas,) in zip(makers, found, strict=True) for delta in deltas]
        await call.reply(200, answers[0] if single else answers)


async def _stream(call: Call, makers: Sequence[_Maker], single: bool) -> None:
    so_far: dict[tuple[int, int], Delta] = {}
    async for which, delta in merged([maker.answering.deltas() for maker in makers]):
        maker = makers[which]
        whole = so_far.setdefault((which, delta.choice), Delta(0, delta.choice))
        whole.add(delta)
        index = which * maker.request.items[0].num_kept + delta.choice
        await call.event(maker.body(whole) if single else {**maker.body(whole), "index": index})
    await call.end_events()


class _Maker:
    """Builds the answers to one prompt."""

    def __init__(self, server: Server, request: Request, rid: str, answering: Answering, named: bool) -> None:
        self.request, self.answering = request, answering
        self._rid = rid
        self._began = time.monotonic()
        self._name = namer(server.reader.tokenizer) if named else None

    def body(self, delta: Delta) -> dict[str, Any]:
        """The answer of one choice, so far."""
        usage = self.answering.usage[0]
        meta: dict[str, Any] = {
            "id": self._rid,
            "finish_reason": self._finish(delta),
            "prompt_tokens": usage.num_prompt,
            "completion_tokens": len(delta.tokens),
            "cached_tokens": usage.num_cached,
            "e2e_latency": time.monotonic() - self._began,
        }
        if self.request.logprobs >= 0:
            item = self.request.items[0]
            start = item.params.logprob_start if item.params.prompt_logprobs >= 0 else len(item.tokens)
            meta.update(self._logprobs("input", item.tokens[start:], delta.prompt_logprobs or []))
            meta.update(self._logprobs("output", delta.tokens, delta.logprobs))
        return {"text": delta.text, "output_ids": delta.tokens, "meta_info": meta}

    def _finish(self, delta: Delta) -> dict[str, Any] | None:
        if delta.finish is None:
            return None
        more: dict[str, dict[str, Any]] = {"stop": {"matched": delta.matched}, "length": {"length": len(delta.tokens)}}
        return {"type": delta.finish, **more.get(delta.finish, {})}

    def _logprobs(self, side: str, tokens: Sequence[int], entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        params = self.request.items[0].params
        made: dict[str, Any] = {
            f"{side}_token_logprobs": [self._one(e.logprob, t) for t, e in zip(tokens, entries, strict=False)]
        }
        if params.logprobs > 0:
            made[f"{side}_top_logprobs"] = [self._many(e.top_logprobs, e.top_ids) for e in entries]
        if params.token_ids_logprob:
            asked = params.token_ids_logprob
            made[f"{side}_token_ids_logprobs"] = [self._many(e.asked_logprobs, asked) for e in entries]
        return made

    def _one(self, logprob: float | None, token: int) -> list[Any]:
        """[logprob, token id, text or null]."""
        return [finite(logprob), token, self._name(token) if self._name is not None else None]

    def _many(self, logprobs: Sequence[float], tokens: Sequence[int]) -> list[list[Any]] | None:
        return [self._one(p, t) for p, t in zip(logprobs, tokens, strict=False)] or None
