"""The listener: connections on which nothing comes do not stay, and polls are not logged."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from serve.support import in_loop, world
from tessera.serve import listener
from tessera.serve.listener import Listener, bind
from waits import PATIENCE_S

REQUEST = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", REQUEST[:20], REQUEST, REQUEST + REQUEST[:20]])
@in_loop
async def test_a_connection_without_a_request_is_closed(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "KEEP_ALIVE", 1.0)
    async with world() as (made, _):
        with bind("127.0.0.1", 0) as listening:
            serving = Listener(made.app, listening, access_log=False)
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(sent)
            got = await asyncio.wait_for(reader.read(), PATIENCE_S)
            assert got.count(b"200 OK") == sent.count(REQUEST)
            writer.close()
            await serving.close()


@in_loop
async def test_a_long_answer_keeps_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "KEEP_ALIVE", 0.5)
    body = b'{"prompt": "a", "max_tokens": 20, "ignore_eos": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with world(delay=0.04) as (made, _):
        with bind("127.0.0.1", 0) as listening:
            serving = Listener(made.app, listening, access_log=False)
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(head + body[:5])
            await asyncio.sleep(0.8)
            writer.write(body[5:])
            assert b'"finish_reason":"length"' in await asyncio.wait_for(reader.read(), PATIENCE_S)
            writer.close()
            await serving.close()


@in_loop
async def test_polls_that_are_answered_are_not_logged() -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    access = logging.getLogger("uvicorn.access")
    async with world() as (made, _):
        with bind("127.0.0.1", 0) as listening:
            access.addHandler(handler)
            access.setLevel(logging.INFO)
            try:
                serving = Listener(made.app, listening, access_log=True)
                async with httpx.AsyncClient(base_url=listener.url(listening), trust_env=False) as http:
                    for path in ("/health", "/metrics", "/health?deep=1", "/health_generate", "/healthy", "/v1/models"):
                        await http.get(path)
                    await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
                    await http.post("/health")
                    made.server.draining = True
                    await http.get("/health")
                await serving.close()
            finally:
                access.removeHandler(handler)
    asked = [line.split('"')[1].rsplit(" ", 1)[0] + line.split('"')[2] for line in said]
    assert asked == [
        "GET /healthy 404",
        "GET /v1/models 200",
        "POST /v1/completions 200",
        "POST /health 405",
        "GET /health 503",
    ]
