"""`/generate`: SGLang's native endpoint. Streams carry the whole text so far, as its clients expect."""

from __future__ import annotations

from functools import partial

from starlette.responses import Response

from tessera.serve.http import Call, events, span_of, whole
from tessera.serve.native_body import Asked
from tessera.serve.server import Server


async def generate(server: Server, call: Call) -> Response:
    """Answers one call: an object for one prompt and choice, else a list."""
    asked = Asked(server.reader, await server.body(call), partial(server.answering, span_of(call)))
    return await (events(call, asked.parts()) if asked.stream else whole(call, asked.whole()))
