"""Answers in the form of SGLang's `/generate`: whole ones, and streams that carry the whole text so far."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from typing import Any

import msgspec

from tessera.core.messages import TokenLogprobs
from tessera.serve.answer import Answering, Delta
from tessera.serve.formats import finite, namer
from tessera.serve.merge import merged
from tessera.serve.schema import Reader, Request
from tessera.serve.text import Tokenizer

Body = dict[str, Any]
Begin = Callable[[Request, str], AbstractContextManager[Answering]]


class Asked:
    """One call of `/generate`, read. `begin(request, rid)` submits; leaving that context aborts what still runs."""

    def __init__(self, reader: Reader, body: Any, begin: Begin) -> None:
        """Raises RequestError."""
        asked = reader.generate(body)
        self._requests = asked if isinstance(asked, list) else [asked]
        # The answer is one object: one prompt, not in a list, and one choice.
        self._single = not isinstance(asked, list) and asked.items[0].num_kept == 1
        self._tokenizer, self._begin = reader.tokenizer, begin
        self._named = isinstance(body, dict) and bool(body.get("return_text_in_logprobs"))
        self.stream = self._requests[0].stream

    @contextmanager
    def _begun(self) -> Iterator[list[_Maker]]:
        with ExitStack() as stack:
            makers = []
            for request in self._requests:
                rid = request.rid or f"gen-{uuid.uuid4().hex}"
                answering = stack.enter_context(self._begin(request, rid))
                makers.append(_Maker(self._tokenizer, request, rid, answering, self._named))
            yield makers

    async def whole(self) -> Body | list[Body]:
        """The finished answers, or the only one."""
        with self._begun() as makers:
            found = await asyncio.gather(*(maker.answering.collect() for maker in makers))
            answers = [maker.body(delta) for maker, (deltas,) in zip(makers, found, strict=True) for delta in deltas]
            return answers[0] if self._single else answers

    async def parts(self) -> AsyncGenerator[Body, None]:
        """Answers as they grow, each with all of its text so far; in a batch with their place."""
        so_far: dict[tuple[int, int], Delta] = {}
        with self._begun() as makers:
            async with aclosing(merged([maker.answering.deltas() for maker in makers])) as deltas:
                async for which, delta in deltas:
                    maker = makers[which]
                    grown = so_far.setdefault((which, delta.choice), Delta(0, delta.choice))
                    grown.add(delta)
                    index = which * maker.request.items[0].num_kept + delta.choice
                    yield maker.body(grown) if self._single else {**maker.body(grown), "index": index}


class _Maker:
    """Builds the answers to one prompt. `named`: tokens of logprobs come with their text."""

    def __init__(
        self, tokenizer: Tokenizer | None, request: Request, rid: str, answering: Answering, named: bool
    ) -> None:
        self.request, self.answering = request, answering
        self._rid = rid
        self._began = time.monotonic()
        self._name = namer(tokenizer) if named else None

    def body(self, delta: Delta) -> Body:
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
        if usage.handed is not None:
            times = msgspec.structs.asdict(usage.handed)
            meta["handover"] = {**times, "ended": usage.handed.ended - self._began}  # seconds, as the others are
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
