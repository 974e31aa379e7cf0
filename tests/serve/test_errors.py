"""Bad input is refused with a 4xx in OpenAI's form that names the field; nothing takes the server down."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from serve.fake_engine import BUSY, REFUSE
from serve.support import CONTEXT, Visitor, World, in_loop, refusal, world
from tessera.core.messages import Submit
from tessera.serve import http as wire
from tessera.serve.app import ROUTES
from tessera.serve.fields import CHAT, COMPLETION, GENERATE, SAMPLING_PARAMS
from waits import until

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "a", "colour": 1}, "colour", "unknown field"),
        ({"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "allowed is a number"),
        ({"prompt": "a", "temperature": 101}, "temperature", "from 0 to 100"),
        ({"prompt": "a", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "a", "n": 0}, "n", "from 1"),
        ({"prompt": "a", "n": True}, "n", "an integer"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"prompt": "a", "max_tokens": CONTEXT}, "max_tokens", f"at most {CONTEXT - 1}"),
        ({"prompt": "a" * CONTEXT}, "prompt", f"{CONTEXT} tokens"),
        ({"prompt": "a" * 10000}, "prompt", "10000 characters"),
        ({"prompt": [97] * CONTEXT}, "prompt", "at least one must be left"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ""}, "prompt", "at least one"),
        ({"prompt": [259]}, "prompt", "from 0 to 258"),
        ({"prompt": [-1]}, "prompt", "from 0 to 258"),
        ({"prompt": [1.5]}, "prompt", "from 0 to 258"),
        ({"prompt": {"a": 1}}, "prompt", "text or token ids"),
        ({}, "prompt", "missing"),
        ({"prompt": "a", "stop": ""}, "stop", "1 to 1024 characters"),
        ({"prompt": "a", "stop": [1]}, "stop[0]", "1 to 1024 characters"),
        ({"prompt": "a", "stop": ["x"] * 65}, "stop", "at most 64"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x", "a token id"),
        ({"prompt": "a", "logit_bias": {"5": 200}}, "logit_bias.5", "from -100 to 100"),
        ({"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias", "from 0 to 258"),
        ({"prompt": "a", "stop_token_ids": [9999]}, "stop_token_ids", "from 0 to 258"),
        ({"prompt": "a", "min_tokens": 99}, "min_tokens", "at most the tokens to generate"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"prompt": "a", "stream": True, "stream_options": {"colour": 1}}, "stream_options.colour", "unknown"),
        ([1, 2], "body", "an object"),
        ("text", "body", "an object"),
    ],
)
@in_loop
async def test_bad_fields_are_named(body: Any, param: str, says: str) -> None:
    async with world() as (made, http):
        error = refusal(await http.post(PATH, json=body))
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert says in error["message"]
        assert not any(isinstance(m, Submit) for m in made.engine.seen)
        assert (await http.post(PATH, json={"prompt": "a"})).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a" * CONTEXT}, "prompt"),
        ("/v1/completions", {"prompt": "a" * 10000}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": CONTEXT}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10000}]}, "messages"),
        ("/generate", {"text": "a" * CONTEXT}, "text"),
        ("/generate", {"input_ids": [97] * CONTEXT}, "input_ids"),
    ],
)
@in_loop
async def test_what_is_too_long_has_the_code_by_which_clients_know_it(path: str, body: Any, param: str) -> None:
    async with world() as (_, http):
        error = refusal(await http.post(path, json=body))
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")


@in_loop
async def test_a_tokenizer_that_is_another_models_is_told() -> None:
    """Known fault: a token beyond the model's vocabulary was served, with whatever stood behind the embedding."""
    async with world() as (made, http):
        made.server.reader.limits = dataclasses.replace(made.server.reader.limits, vocab_size=100)
        assert (await http.post(PATH, json={"prompt": "abc"})).status_code == 200
        error = refusal(await http.post(PATH, json={"prompt": "axb"}))
        assert error["param"] == "prompt"
        assert "token 120" in error["message"]
        assert "--tokenizer-path" in error["message"]


@in_loop
async def test_an_empty_body_is_called_that() -> None:
    async with world() as (_, http):
        assert "empty" in refusal(await http.post(PATH))["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b'{"prompt": "\xff"}', b"[" * 100000, b'{"prompt": 1e999}', b"nul"])
@in_loop
async def test_broken_json_is_refused(raw: bytes) -> None:
    async with world() as (_, http):
        assert refusal(await http.post(PATH, content=raw))["param"] in ("body", "prompt")


@in_loop
async def test_a_body_too_large_is_refused_before_it_is_read() -> None:
    async with world() as (made, http):
        visitor = Visitor(made.app, PATH, [b"x"], {"content-length": str(100 << 20)})
        await visitor.task
        assert (visitor.status, visitor.asked) == (413, 0)
        parts = [b"x" * (8 << 20)] * 13
        visitor = Visitor(made.app, PATH, parts)
        await visitor.task
        assert (visitor.status, visitor.asked) == (413, 5), "32 MiB are allowed; the fifth 8 MiB are over it"
        assert (await http.post(PATH, json={"prompt": "a"})).status_code == 200


@in_loop
async def test_a_body_that_never_comes_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BODY_SECONDS", 0.05)
    async with world() as (made, _):
        visitor = Visitor(made.app, PATH, [b"{", b""])
        visitor._parts.pop()
        visitor._parts = []
        await visitor.task
        assert visitor.status == 408


@in_loop
async def test_a_body_may_come_slowly_as_long_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "BODY_SECONDS", 1.0)

    async def slowly() -> AsyncIterator[dict[str, Any]]:
        for part in b'{"tokens":[97]}':
            await asyncio.sleep(0.1)
            yield {"type": "http.request", "body": bytes([part]), "more_body": part != ord("}")}

    async with world() as (made, _):
        scope = {"type": "http", "method": "POST", "path": "/detokenize", "query_string": b"", "headers": []}
        got: asyncio.Queue[Any] = asyncio.Queue()
        await made.app(scope, slowly().__anext__, got.put)
        assert got.get_nowait()["status"] == 200


@in_loop
async def test_unknown_models_paths_and_methods() -> None:
    async with world() as (_, http):
        error = refusal(await http.post(PATH, json={"prompt": "a", "model": "other"}), 404)
        assert (error["param"], error["code"]) == ("model", "not_found")
        for name in ("tiny", "some/path", "default", ""):
            assert (await http.post(PATH, json={"prompt": "a", "model": name})).status_code == 200
        told = refusal(await http.get("/v1/nothing"), 404)["message"]
        assert "/v1/completions" in told
        assert "/v1/models/{name}" in told
        found = await http.get(PATH)
        assert refusal(found, 405)["message"]
        assert found.headers["allow"] == "POST"
        assert found.headers["content-type"] == "application/json"
        assert (await http.head("/v1/models")).status_code == 200
        for path in ("/health/", "/v1/completions/", "/"):
            refusal(await http.get(path), 404)


@pytest.mark.parametrize("api_key", [None, "sesame"])
@in_loop
async def test_websockets_are_refused(api_key: str | None) -> None:
    async with world(api_key=api_key) as (made, _):
        sent: list[str] = []

        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message["type"])

        await made.app({"type": "websocket", "path": "/generate", "headers": []}, receive, send)
        assert sent == ["websocket.close"]


@in_loop
async def test_a_key_is_asked_for_everywhere_but_health() -> None:
    async with world(api_key="sesame") as (_, http):
        for path, (_, methods) in ROUTES.items():
            for method in methods:
                found = await http.request(method, path)
                assert (found.status_code == 401) == (path != "/health"), path
        assert refusal(await http.get("/v1/nothing"), 401)
        wrong = {"authorization": "Bearer open"}
        error = refusal(await http.post(PATH, json={"prompt": "a"}, headers=wrong), 401)
        assert error["code"] == "invalid_api_key"
        right = {"authorization": "Bearer sesame"}
        assert (await http.post(PATH, json={"prompt": "a"}, headers=right)).status_code == 200


@in_loop
async def test_the_engine_may_refuse_or_have_no_room() -> None:
    async with world() as (made, http):
        assert refusal(await http.post(PATH, json={"prompt": [REFUSE]}))["message"] == "no room"
        found = await http.post(PATH, json={"prompt": [BUSY]})
        assert refusal(found, 503)["message"] == "no room"
        assert found.headers["retry-after"] == "1"
        refused = await http.post(PATH, json={"prompt": [REFUSE], "stream": True})
        assert refusal(refused, 400)
        assert not made.server.running


@in_loop
async def test_too_many_at_once_get_503() -> None:
    async with world(max_open=4) as (_, http):
        error = refusal(await http.post(PATH, json={"prompt": ["a"] * 5}), 503)
        assert "try again later" in error["message"]
        assert (await http.post(PATH, json={"prompt": ["a"] * 4})).status_code == 200


@in_loop
async def test_an_error_of_ours_is_a_500_that_tells_nothing_of_its_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as (made, http):
        monkeypatch.setattr(made.server.reader, "limits", None)
        error = refusal(await http.post(PATH, json={"prompt": "a"}), 500)
        assert "AttributeError" in error["message"]
        assert "limits" not in error["message"]


@in_loop
async def test_an_error_inside_a_stream_is_an_event_of_it() -> None:
    async with world(delay=0.01) as (made, http):
        call = asyncio.create_task(http.post(PATH, json={"prompt": "a", "stream": True, "max_tokens": 30}))
        await until(lambda: made.engine.steps > 3)
        made.client.fail(wire.PeerError("the engine process was ended by SIGKILL"))
        text = (await call).text
        assert '"unavailable_error"' in text
        assert text.endswith("data: [DONE]\n\n")
        refusal(await http.post(PATH, json={"prompt": "a"}), 503)


async def broken_streams(error: Exception) -> list[str]:
    """Six streams under way, and the same breaks all of them."""
    async with world(delay=0.01) as (made, http):
        body = {"prompt": "a", "stream": True, "max_tokens": 300, "ignore_eos": True}
        calls = [asyncio.create_task(http.post(PATH, json=body)) for _ in range(6)]
        await until(lambda: made.engine.steps > 3)
        made.client.fail(error)  # type: ignore[arg-type]
        return [(await call).text for call in calls]


@in_loop
async def test_an_engine_that_ends_is_not_logged_by_every_stream_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """Who looks after engines tells it once, and every client is told."""
    for text in await broken_streams(wire.PeerError("the engine process was ended by SIGKILL")):
        assert text.count("ended by SIGKILL") == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@in_loop
async def test_a_fault_of_ours_in_a_stream_leaves_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    for text in await broken_streams(KeyError("forgotten")):
        assert ("internal error (KeyError)" in text, "forgotten" in text) == (True, False)
    assert {record.getMessage() for record in caplog.records if record.exc_info} == {"a stream failed"}
    assert "KeyError: 'forgotten'" in caplog.text


# -- whatever comes ----------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, -1, 2, 5])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def bodies(names: set[str], likely: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    """Bodies with some known fields of odd values, over one that is nearly right."""
    odd = st.dictionaries(st.sampled_from(sorted(names)) | st.text(max_size=6), VALUES, max_size=4)
    return VALUES | st.tuples(likely, odd).map(lambda both: {**both[0], **both[1]})


FEW = st.integers(1, 3)
REQUESTS = st.one_of(
    st.tuples(
        st.just("/v1/completions"),
        bodies(COMPLETION.known, st.fixed_dictionaries({"prompt": st.just("a"), "max_tokens": FEW})),
    ),
    st.tuples(
        st.just("/v1/chat/completions"),
        bodies(CHAT.known, st.just({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})),
    ),
    st.tuples(
        st.just("/generate"),
        bodies(
            GENERATE.known,
            st.fixed_dictionaries(
                {"text": st.just("a"), "sampling_params": bodies(SAMPLING_PARAMS.known, st.just({}))}
            ),
        ),
    ),
    st.tuples(
        st.sampled_from([path for path, (_, methods) in ROUTES.items() if "POST" in methods]),
        bodies({"tokens", "prompt", "messages", "rid", "abort_all", "text"}, st.just({})),
    ),
)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=4))
def test_no_json_ever_gives_a_5xx(requests: list[tuple[str, Any]]) -> None:
    @in_loop
    async def play() -> None:
        async with world() as (made, http):
            for path, body in requests:
                found = await http.post(path, content=wire.encode(body), headers={"content-type": "application/json"})
                assert found.status_code < 500, (path, body, found.text)
                if found.status_code >= 400:
                    refusal(found, found.status_code)
            await quiet(made)

    play()


async def quiet(made: World) -> None:
    """Nothing is left of what was asked."""
    await until(lambda: not made.server.running and not len(made.client) and not made.engine.rows)
