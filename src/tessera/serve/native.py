"""`/generate`: SGLang's native endpoint. Streams carry the whole text so far, as its clients expect."""

from __future__ import annotations

from contextlib import ExitStack

from tessera.serve.http import Call
from tessera.serve.native_body import Maker, is_single, parts, whole
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
    with ExitStack() as stack:
        makers = []
        for request in requests:
            rid = request.rid or new_id("gen")
            answering = stack.enter_context(server.answering(request, rid))
            makers.append(Maker(server.reader.tokenizer, request, rid, answering, named))
        if not requests[0].stream:
            await call.reply(200, await whole(makers, is_single(asked)))
            return
        async for body in parts(makers, is_single(asked)):
            await call.event(body)
        await call.end_events()
