"""The HTTP client loses nothing: events in any pieces, counts with and without usage, and every failure by its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from serve.support import CONTEXT, world
from tessera.client import Ask, HttpClient, Piece, answer
from tessera.core.errors import DeadlineError, PeerError, RequestError

ASK = Ask(text="hi", max_tokens=3)
Handler = Callable[[httpx.Request], httpx.Response]


class Cut(httpx.AsyncByteStream):
    """A body in pieces of `size` bytes; `then` is raised behind it."""

    def __init__(self, body: bytes, size: int = 7, then: Exception | None = None) -> None:
        self._body, self._size, self._then = body, size, then

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for i in range(0, len(self._body), self._size):
            yield self._body[i : i + self._size]
        if self._then is not None:
            raise self._then


def events(*payloads: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(p)}\n\n".encode() for p in payloads]
    return b"".join([b": a comment\n\n", *lines, b"data: [DONE]\n\n" if done else b""])


def completion(text: str, count: int | None = None, finish: str | None = None) -> dict[str, Any]:
    usage = {} if count is None else {"usage": {"completion_tokens": count, "prompt_tokens": 5}}
    return {"choices": [{"text": text, "finish_reason": finish}], **usage}


def ask(handler: Handler, what: Ask = ASK, model: str | None = "m") -> list[Piece]:
    async def run() -> list[Piece]:
        client = HttpClient("server:1/v1/", model, "key", httpx.MockTransport(handler))
        try:
            async with aclosing(client.stream(what)) as pieces:
                return [piece async for piece in pieces]
        finally:
            await client.close()

    return asyncio.run(run())


def streamed(body: bytes, size: int = 7, then: Exception | None = None) -> Handler:
    return lambda request: httpx.Response(200, stream=Cut(body, size, then))


@pytest.mark.parametrize("size", [1, 7, 10000])
def test_events_in_any_pieces_are_one_answer(size: int) -> None:
    body = events(completion("é", 1), completion("", 2), completion("b\n", 4, "stop"), {"choices": [], "usage": None})
    pieces = ask(streamed(body, size))
    assert [(p.text, p.num_tokens, p.num_prompt, p.finish) for p in pieces] == [
        ("é", 1, 5, None),
        ("", 2, 5, None),
        ("b\n", 4, 5, "stop"),
    ]


def test_without_usage_a_piece_is_a_token_and_the_last_word_counts() -> None:
    final = {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 4}}
    pieces = ask(streamed(events(completion("a"), completion("b", None, "length"), final)))
    assert [p.num_tokens for p in pieces] == [1, 2, 9]
    assert (pieces[-1].num_prompt, pieces[-1].finish) == (4, "length")


def test_what_is_asked_is_sent_and_nothing_else() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return streamed(events(completion("a", 1, "stop")))(request)

    ask(handler, Ask(tokens=[1, 2], max_tokens=4, seed=7, ignore_eos=True, stop=("x",), more={"min_p": 0.1}))
    (request,) = seen
    assert str(request.url) == "http://server:1/v1/completions"
    assert request.headers["authorization"] == "Bearer key"
    assert json.loads(request.content) == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 4,
        "temperature": 0.0,
        "seed": 7,
        "ignore_eos": True,
        "stop": ["x"],
        "min_p": 0.1,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


@pytest.mark.parametrize(
    ("response", "kind", "text"),
    [
        (
            httpx.Response(400, json={"error": {"message": "top_k: found -7"}}),
            RequestError,
            "status 400: top_k: found -7",
        ),
        (httpx.Response(404, json={"message": "no such model"}), RequestError, "status 404: no such model"),
        (httpx.Response(503, json={"error": {"message": "loading"}}), PeerError, "status 503: loading"),
        (httpx.Response(500, text="<html>oops"), PeerError, "status 500: <html>oops"),
        (
            httpx.Response(200, content=events({"error": {"message": "out of pages"}})),
            PeerError,
            "gave up: out of pages",
        ),
        (httpx.Response(200, content=events(completion("a", 1), done=False)), PeerError, "before the answer was whole"),
        (httpx.Response(200, content=b"data: [1\n\n"), PeerError, "no JSON object"),
        (httpx.Response(200, stream=Cut(b"", then=httpx.ReadTimeout("x"))), DeadlineError, "silent for longer"),
        (httpx.Response(200, stream=Cut(b"", then=httpx.ReadError("reset"))), PeerError, "reset"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_every_failure_has_its_name(response: httpx.Response, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ask(lambda request: response)


def test_the_model_is_the_first_that_is_listed() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        assert json.loads(request.content)["model"] == "first"
        return streamed(events(completion("a", 1, "stop")))(request)

    assert ask(handler, model=None)[0].text == "a"
    with pytest.raises(PeerError, match="lists no model"):
        ask(lambda request: httpx.Response(200, json={"data": []}), model=None)
    with pytest.raises(RequestError, match="status 401"):
        ask(lambda request: httpx.Response(401, json={"error": {"message": "no key"}}), model=None)


def test_our_own_server_is_understood() -> None:
    async def run() -> None:
        async with world() as (made, _):
            client = HttpClient("http://tessera", transport=httpx.ASGITransport(app=made.app))  # type: ignore[arg-type]
            for what in (
                Ask(text="hello", max_tokens=5),
                Ask(tokens=[65, 66, 67], max_tokens=5),
                Ask(messages=({"role": "user", "content": "hi"},), max_tokens=5),
            ):
                got = await answer(client, what)
                assert (got.num_tokens, got.finish) == (5, "length")
                assert got.text
            assert (await answer(client, Ask(tokens=[65, 66, 67], max_tokens=5))).num_prompt == 3
            assert await client.vocab_size() == made.server.reader.limits.vocab_size
            await client.flush()
            with pytest.raises(RequestError, match="unknown field 'num_step'"):
                await client.start_profile({"num_step": 1})
            with pytest.raises(RequestError, match="max_tokens"):
                await answer(client, Ask(text="hello", max_tokens=CONTEXT))
            await client.close()

    asyncio.run(run())
