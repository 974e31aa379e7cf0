"""Whoever leaves, aborts or reads too slowly frees what was held, within one step."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from serve.support import Visitor, in_loop, refusal, world
from tessera.core.errors import CapacityError, PeerError
from tessera.core.messages import Abort, Output, SamplingParams
from tessera.serve import client as client_module
from tessera.serve.client import EngineClient
from tessera.serve.schema import Item
from waits import until

BODIES = {
    "/v1/completions": {"prompt": ["a", "b"], "n": 2, "max_tokens": 400, "ignore_eos": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400, "ignore_eos": True},
    "/generate": {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
@in_loop
async def test_a_client_that_leaves_stops_its_request_within_a_step(path: str, stream: bool) -> None:
    async with world(delay=0.002) as (made, _):
        visitor = Visitor(made.app, path, [json.dumps({**BODIES[path], "stream": stream}).encode()])
        await until(lambda: made.engine.steps >= 5)
        assert made.engine.rows
        visitor.left.set()
        await visitor.task
        steps = made.engine.steps
        await until(lambda: not made.engine.rows)
        assert made.engine.steps - steps <= 1
        assert not made.server.running
        assert len(made.client) == 0
        assert made.server.quiet.is_set()
        assert b'outcome="abort"}' in made.server.metrics.text()


@in_loop
async def test_a_client_that_leaves_before_its_body_is_whole_starts_nothing() -> None:
    async with world() as (made, _):
        visitor = Visitor(made.app, "/generate", [b'{"text": ', b""])
        visitor._parts = [b'{"text": ']
        visitor.left.set()
        await visitor.task
        assert not made.engine.seen


@pytest.mark.parametrize("path", BODIES)
@in_loop
async def test_a_client_that_reads_nothing_is_left_after_a_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.serve.http.SEND_SECONDS", 0.05)
    async with world(delay=0.002) as (made, _):
        visitor = Visitor(made.app, path, [json.dumps({**BODIES[path], "stream": True}).encode()])
        visitor.reads.clear()
        await until(visitor.task.done)
        await visitor.task
        await until(lambda: not made.engine.rows)
        assert not made.server.running


@in_loop
async def test_a_stream_that_is_dropped_between_two_events_is_closed_at_once() -> None:
    async with world(delay=0.002) as (made, _):
        visitor = Visitor(made.app, "/generate", [json.dumps({**BODIES["/generate"], "stream": True}).encode()])
        visitor.reads.clear()  # so the answer waits in `send`, not for the engine
        await until(lambda: made.engine.steps >= 3)
        visitor.left.set()
        await visitor.task
        assert not made.server.running


@in_loop
async def test_a_request_is_aborted_by_its_id() -> None:
    async with world(delay=0.002) as (made, http):
        calls = {
            rid: asyncio.create_task(
                http.post("/v1/completions", json={**BODIES["/v1/completions"], "rid": rid, "prompt": "a"})
            )
            for rid in ("one", "two")
        }
        await until(lambda: made.engine.steps >= 3)
        taken = await http.post("/v1/completions", json={"prompt": "a", "rid": "one"})
        assert refusal(taken)["param"] == "rid"
        assert (await http.post("/abort_request", json={"rid": "nobody"})).json() == {"aborted": 0}
        assert (await http.post("/abort_request", json={"rid": "one"})).json() == {"aborted": 1}
        choices = (await calls["one"]).json()["choices"]
        assert [c["finish_reason"] for c in choices] == ["abort", "abort"]
        assert choices[0]["text"].startswith("The")
        assert not calls["two"].done()
        assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 1}
        assert (await calls["two"]).json()["choices"][0]["finish_reason"] == "abort"
        assert refusal(await http.post("/abort_request", json={}))["param"] == "rid"


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_batch_is_aborted_by_its_id_and_nobody_else_is(stream: bool) -> None:
    """SGLang ends whatever id begins with the one that is named, so "1" there ends a foreign "10", "1_0" and "1x"."""
    async with world(delay=0.002) as (made, http):
        one = {**BODIES["/generate"], "text": "a"}
        bodies = {rid: {**one, "rid": rid} for rid in ("10", "1x", "2_0", "11_0")}
        bodies["1"] = {**BODIES["/generate"], "rid": "1", "stream": stream}
        bodies["named"] = {**BODIES["/generate"], "rid": ["1_7", "other"]}
        calls = {name: asyncio.create_task(http.post("/generate", json=body)) for name, body in bodies.items()}
        await until(lambda: len(made.server.running) == 8 and made.engine.steps >= 3)
        for rid in ("1", ["8", "1_1"], "1_0"):  # neither the batch nor one of it may be somebody else meanwhile
            text = ["a", "b"] if isinstance(rid, list) else "a"
            assert refusal(await http.post("/generate", json={**one, "text": text, "rid": rid}))["param"] == "rid"
        assert refusal(await http.post("/generate", json={**BODIES["/generate"], "rid": "2"}))["param"] == "rid"
        assert (await http.post("/abort_request", json={"rid": ""})).json() == {"aborted": 0}
        assert (await http.post("/abort_request", json={"rid": "1_0"})).json() == {"aborted": 1}, "one of the batch"
        assert (await http.post("/abort_request", json={"rid": "1"})).json() == {"aborted": 1}, "the rest of it"
        answer = await calls.pop("1")
        if not stream:
            assert [a["meta_info"]["id"] for a in answer.json()] == ["1_0", "1_1"]
            assert [a["meta_info"]["finish_reason"]["type"] for a in answer.json()] == ["abort", "abort"]
        assert not any(call.done() for call in calls.values())
        assert (await http.post("/abort_request", json={"rid": "1"})).json() == {"aborted": 0}
        assert (await http.post("/abort_request", json={"abort_all": True})).json() == {"aborted": 6}
        await asyncio.gather(*calls.values())
        assert not made.server.running
        assert not made.server.batches
        assert not made.engine.rows


@in_loop
async def test_many_clients_that_come_and_go_leave_nothing() -> None:
    rng = random.Random(0)
    async with world(delay=0.0005) as (made, _):

        async def one() -> None:
            path = rng.choice(list(BODIES))
            body = {**BODIES[path], "stream": rng.random() < 0.5}
            visitor = Visitor(made.app, path, [json.dumps(body).encode()])
            await asyncio.sleep(rng.random() * 0.05)
            visitor.left.set()
            await visitor.task

        await asyncio.gather(*(one() for _ in range(200)))
        await until(lambda: not made.engine.rows)
        assert not made.server.running
        assert len(made.client) == 0


# -- the client itself -------------------------------------------------------------------------------------------------


def item(n: int = 1) -> Item:
    return Item([1, 2], SamplingParams(), n, n)


@in_loop
async def test_a_stream_that_nobody_reads_fails_and_does_not_grow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "MAX_PENDING", 10)
    client = EngineClient([lambda message: None])
    stream = client.submit([item()])
    for _ in range(12):
        stream.put(Output(stream.ids[0], 0, [1]))
    assert len(await stream.read()) == 12
    assert caplog.messages == ["a stream failed: 10 outputs wait unread: the client reads too slowly"]
    with pytest.raises(CapacityError, match="reads too slowly"):
        await stream.read()


@in_loop
async def test_a_failed_engine_fails_all_now_and_later() -> None:
    sent: list[object] = []
    client = EngineClient([sent.append])
    waiting = [client.submit([item()]) for _ in range(3)]
    client.fail(PeerError("first"))
    client.fail(PeerError("second"))
    for stream in waiting:
        with pytest.raises(PeerError, match="first"):
            await stream.read()
        stream.close()
    with pytest.raises(PeerError, match="first"):
        client.submit([item()])
    assert len(sent) == 3, "nothing is sent to an engine that has ended"
    assert len(client) == 0


@in_loop
async def test_outputs_after_an_end_are_dropped() -> None:
    sent: list[object] = []
    client = EngineClient([sent.append])
    stream = client.submit([item(2)])
    (rid,) = stream.ids
    stream.stop(rid, 0)
    stream.put(Output(rid, 0, [5]))
    stream.put(Output(rid, 1, [6], finish="length"))
    stream.put(Output(rid, 1, [7]))
    assert [output.tokens for output in await stream.read()] == [[6]]
    assert not stream.open
    stream.close()
    assert [m for m in sent if isinstance(m, Abort)] == [Abort(rid, 0, "stop")]
