"""The router before fake servers: pairs whole or not at all, streams byte for byte, nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from serve.router.fakes import PATHS, Fake, Rooms, World, world
from serve.support import in_loop, refusal
from tessera.serve.router.connections import Connections
from tessera.serve.router.router import Options, Router
from waits import PATIENCE_S, until

PROMPTS = {"/generate": {"text": "hi"}, "/v1/completions": {"prompt": "hi"}, "/v1/chat/completions": {"messages": []}}


async def bytes_of(made: World, path: str, body: dict[str, object]) -> tuple[httpx.Response, bytes]:
    async with made.http.stream("POST", path, json=body) as response:
        return response, b"".join([chunk async for chunk in response.aiter_raw()])


@pytest.mark.parametrize("path", PATHS)
@in_loop
async def test_a_pair_is_asked_and_the_decode_servers_stream_is_passed_byte_for_byte(path: str) -> None:
    async with world(prefill=2, decode=2) as made:
        for _ in range(4):
            response, body = await bytes_of(made, path, {**PROMPTS[path], "stream": True, "seed": 1})
            assert body == b"".join(made.of("decode")[0].chunks)
            assert (response.status_code, response.headers["x-fake"]) == (200, "decode")
        for fake in made.fakes:
            assert [seen[0] for seen in fake.seen] == [path] * 2, "round robin"
        sent = {body["bootstrap_room"]: body for fake in made.of("prefill") for _, body, _ in fake.seen}
        got = {body["bootstrap_room"]: body for fake in made.of("decode") for _, body, _ in fake.seen}
        assert sent.keys() == got.keys()
        assert all(body["stream"] is False and body["seed"] == 1 for body in sent.values())
        assert all(body["stream"] is True and body["seed"] == 1 for body in got.values())
        assert {b["bootstrap_port"] for b in got.values()} == {8998}
        assert [fake.aborted for fake in made.fakes] == [[]] * 4


@in_loop
async def test_a_batch_gets_a_room_for_each_prompt_and_the_whole_answer_comes_back() -> None:
    async with world(prefill=1, decode=1, dp=2) as made:
        answers = [(await made.http.post("/generate", json={"text": ["a", "b", "c"]})).json() for _ in range(2)]
        assert [len(set(answer["rooms"])) for answer in answers] == [3, 3]
        assert answers[0]["role"] == "decode"
        (first, second) = [body for _, body, _ in made.of("decode")[0].seen]
        for body in (first, second):
            assert [room % 2 for room in body["bootstrap_room"]] == [0, 1, 0], "dealt out over the ranks"


@in_loop
async def test_prompts_are_spread_over_the_ranks_of_a_prefill_server() -> None:
    async with world(prefill=1, decode=1, dp=2) as made:
        made.of("decode")[0].gap = 0.1
        body = {"text": "a", "stream": True}
        await asyncio.gather(*(bytes_of(made, "/generate", body) for _ in range(4)))
        ranks = [body["routed_dp_rank"] for _, body, _ in made.of("prefill")[0].seen]
        assert sorted(ranks) == [0, 0, 1, 1]


@pytest.mark.parametrize("failing", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 503])
@in_loop
async def test_the_first_failing_leg_cancels_the_other_at_once(failing: str, status: int) -> None:
    async with world(prefill=1, decode=1) as made:
        bad, other = made.of(failing)[0], made.of("decode" if failing == "prefill" else "prefill")[0]  # type: ignore[arg-type]
        bad.status = status
        for stream in (False, True):
            response = await made.http.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert refusal(response, status)["message"] == "no"
            await until(lambda: len(other.left) + len(other.aborted) >= 2 and made.idle())
            rid = bad.seen[-1][1]["rid"]
            assert other.aborted == [rid], "asked by name, besides the closed connection"
            other.left.clear(), other.aborted.clear()
        counted = made.router.fleet.of(failing)[0].circuit._faults  # type: ignore[arg-type]
        assert counted == (2 if status == 503 else 0), "only 5xx count"
        assert made.router.fleet.of(other.role)[0].circuit._faults == 0


@in_loop
async def test_a_stream_ends_with_an_error_when_prefill_fails_behind_it() -> None:
    async with world(prefill=1, decode=1, silence=1.5) as made:
        made.of("prefill")[0].hang = True  # it never answers, though decode streams
        decode = made.of("decode")[0]
        decode.gap = 0.5
        room = decode.rooms.event
        body: dict[str, object] = {"text": "x", "stream": True}

        async def open_room() -> None:
            await until(lambda: bool(decode.seen))
            room("prefill", decode.seen[0][1]["bootstrap_room"]).set()

        opener = asyncio.create_task(open_room())
        response, got = await bytes_of(made, "/generate", body)
        await opener
        assert response.status_code == 200
        assert got.startswith(decode.chunks[0])
        assert b"silent for too long" in got
        assert got.endswith(b"data: [DONE]\n\n")
        await until(lambda: bool(decode.left) and bool(decode.aborted))


@in_loop
async def test_a_silent_server_is_a_504_and_counts() -> None:
    async with world(worker=1, silence=0.2) as made:
        made.fakes[0].hang = True
        refusal(await made.http.post("/generate", json={"text": "x"}), 504)
        assert made.router.fleet.servers[0].circuit._faults == 1


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_client_that_leaves_cancels_both_legs(stream: bool) -> None:
    async with world(prefill=1, decode=1) as made:
        made.of("decode")[0].hang = True
        asking = asyncio.create_task(made.http.post("/generate", json={"text": "x", "stream": stream}))
        await until(lambda: all(fake.seen for fake in made.fakes))
        asking.cancel()
        await until(lambda: all(fake.left and fake.aborted for fake in made.fakes))
        await until(made.idle)
        assert all(server.circuit._faults == 0 for server in made.router.fleet.servers)


@in_loop
async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_it() -> None:
    async with world(prefill=1, decode=1) as made:
        decode = made.of("decode")[0]
        decode.chunks, decode.gap = [b"data: {}\n\n"] * 1000, 0.02
        async with made.http.stream("POST", "/generate", json={"text": "x", "stream": True}) as response:
            await anext(response.aiter_raw())
        await until(lambda: bool(decode.left and decode.aborted))
        assert made.of("prefill")[0].aborted == [], "it had done its part"


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_prefill_server_that_answers_late_is_waited_for_and_the_client_is_not(stream: bool) -> None:
    async with world(prefill=1, decode=1) as made:
        made.of("prefill")[0].go_on.clear()
        await bytes_of(made, "/generate", {"text": "x", "stream": stream})
        assert made.router.fleet.of("prefill")[0].in_flight == 1, "the client has its answer before"
        made.of("prefill")[0].go_on.set()
        await until(made.idle)
        assert made.of("prefill")[0].left == made.of("prefill")[0].aborted == []


@in_loop
async def test_nothing_is_sent_to_one_half_when_the_other_is_missing() -> None:
    async with world(prefill=1, decode=1, threshold=1) as made:
        made.of("decode")[0].health = 503
        await until(lambda: made.router.trouble is not None)
        answer = await made.http.post("/generate", json={"text": "x"})
        told = refusal(answer, 503)
        assert answer.headers["retry-after"] == "1"
        assert "no decode server takes requests now" in told["message"]
        assert (await made.http.get("/health")).status_code == 503
        assert made.of("prefill")[0].seen == []
        made.of("decode")[0].health = 200
        await made.up()
        assert (await made.http.post("/generate", json={"text": "x"})).status_code == 200


@in_loop
async def test_a_server_that_has_not_answered_yet_is_waited_for_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """Known fault: a router before a server that never came said nothing at all. Each reason is told once."""
    caplog.set_level(logging.INFO, "tessera.serve.router.router")
    fake = Fake("worker", Rooms())
    await fake.stop()
    router = Router(Options((fake.address,), interval=0.02))
    watching = asyncio.create_task(router.watch())
    try:
        server = router.fleet.servers[0]
        await until(lambda: len(caplog.messages) == 1)
        await asyncio.sleep(0.2)  # many more probes
        fake.health = 503
        fake.start()
        await until(lambda: len(caplog.messages) == 2)
        fake.health = 200
        await until(lambda: server.circuit.takes)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await router.close()
        await fake.stop()
    first, second, third = caplog.messages
    for told, why in ((first, "/health: ConnectError"), (second, "/health says 503")):
        assert re.match(rf"Waiting for worker {fake.url} since \d\d:\d\d:\d\d: {why}", told)
    assert re.match(rf"worker {fake.url} is up, after \d\.\d s", third)


@in_loop
async def test_a_server_that_has_gone_is_passed_over_and_comes_back() -> None:
    async with world(prefill=2, decode=1, threshold=2, interval=0.5) as made:
        gone = made.of("prefill")[0]
        await gone.stop()
        for _ in range(4):
            assert (await made.http.post("/generate", json={"text": "x"})).status_code == 200, "others are tried"
        assert len(made.of("prefill")[1].seen) == 4
        server = made.router.fleet.of("prefill")[0]
        await until(lambda: not server.circuit.takes)
        gone.start()
        await until(lambda: server.circuit.takes)
        for _ in range(2):
            assert (await made.http.post("/generate", json={"text": "x"})).status_code == 200
        assert len(gone.seen) == 1


@in_loop
async def test_one_that_requests_find_gone_is_told_at_once_and_its_cache_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Known fault: only probes were heard of, so one that requests took down was never called down."""
    caplog.set_level(logging.INFO, "tessera.serve.router.router")
    async with world(worker=1, threshold=2, interval=30) as made:
        fake, server = made.fakes[0], made.router.fleet.servers[0]
        policy = made.router.fleet._policies["worker"]
        lost: list[str] = []
        policy.forget = lost.append  # type: ignore[method-assign]
        await fake.stop()
        for _ in range(2):
            assert (await made.http.post("/generate", json={"text": "x"})).status_code == 502
        assert not server.circuit.takes
        assert lost == [fake.url]
        assert f"worker {fake.url} is down: ConnectError All connection attempts failed" in caplog.messages
        fake.start()
        server.circuit.probed("away", 0)
        server.circuit.probed(None, time.monotonic())
        assert re.match(rf"worker {fake.url} is up, after \d\.\d s", caplog.messages[-1])
        assert lost == [fake.url]


@in_loop
async def test_a_broken_stream_is_told_and_counts() -> None:
    async with world(worker=1) as made:
        made.fakes[0].break_after = 2
        _, got = await bytes_of(made, "/generate", {"text": "x", "stream": True})
        assert got.startswith(b"".join(made.fakes[0].chunks[:2]))
        assert b"broke off" in got
        assert made.router.fleet.servers[0].circuit._faults == 1


@in_loop
async def test_a_server_of_another_role_is_never_used() -> None:
    async with world(prefill=1, decode=2, threshold=1) as made:
        wrong = made.of("decode")[0]
        await wrong.stop()
        await until(lambda: not made.router.fleet.of("decode")[0].circuit.takes)
        wrong.mode = "prefill"
        wrong.start()
        await until(lambda: "--disaggregation-mode prefill" in made.router.fleet.of("decode")[0].circuit.reason)
        assert (await made.http.get("/workers")).json()["workers"][1]["is_healthy"] is False


@in_loop
async def test_plain_servers_share_prefixes_and_what_any_or_all_answer() -> None:
    async with world(worker=3, policy="cache_aware") as made:
        talk = {"messages": [{"role": "system", "content": "Be kind. " * 40}, {"role": "user", "content": "1"}]}
        for i in range(6):
            talk["messages"][1]["content"] = str(i)
            assert (await made.http.post("/v1/chat/completions", json=talk)).status_code == 200
        assert sorted(len(fake.seen) for fake in made.fakes) == [0, 0, 6]
        assert (await made.http.get("/v1/models")).json() == {"from": made.fakes[0].url}
        assert set((await made.http.post("/flush_cache")).json()) == {fake.url for fake in made.fakes}
        assert all(("POST", "/flush_cache") in fake.others for fake in made.fakes)
        told = (await made.http.get("/metrics")).text
        assert "tessera:router_server_in_flight" in told
        assert 'tessera:router_requests_total{status="200"} 6.0' in told


@in_loop
async def test_every_server_gets_the_whole_body_of_what_concerns_all_however_it_comes() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        for part in (b'{"rid": ', b'"x", "abort_all": false', b"}"):
            yield part
            await asyncio.sleep(0.05)

    async with world(worker=3, max_body_size=1000) as made:
        answer = await made.http.post("/abort_request", content=slowly())
        assert answer.json() == {fake.url: {"aborted": 1} for fake in made.fakes}
        assert [fake.aborted for fake in made.fakes] == [["x"]] * 3
        for path in ("/abort_request", "/tokenize"):
            refusal(await made.http.post(path, json={"text": "x" * 2000}), 413)


@in_loop
async def test_bad_calls_reach_no_server() -> None:
    async with world(worker=1, max_body_size=1000) as made:
        refusal(await made.http.post("/generate", content=b"{"), 400)
        refusal(await made.http.post("/generate", json=[1]), 400)
        refusal(await made.http.post("/generate", json={"text": "x" * 2000}), 413)
        refusal(await made.http.get("/generate"), 405)
        refusal(await made.http.get("/nothing"), 404)
        assert made.fakes[0].seen == []


@in_loop
async def test_the_key_is_asked_for_and_sent_on() -> None:
    async with world(worker=1, api_key="secret") as made:
        refusal(await made.http.post("/generate", json={"text": "x"}), 401)
        headers = {"authorization": "Bearer secret"}
        assert (await made.http.post("/generate", json={"text": "x"}, headers=headers)).status_code == 200
        assert made.fakes[0].seen[0][2]["authorization"] == "Bearer secret"


@in_loop
async def test_one_trace_id_reaches_both_servers_and_the_client() -> None:
    async with world(prefill=1, decode=1) as made:
        headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01", "tracestate": "x=1"}
        answer = await made.http.post("/generate", json={"text": "x"}, headers=headers)
        got = [fake.seen[0][2]["traceparent"] for fake in made.fakes] + [answer.headers["traceparent"]]
        assert {one.split("-")[1] for one in got} == {"ab" * 16}
        assert len({one.split("-")[2] for one in got} | {"cd" * 8}) == 4
        assert [fake.seen[0][2]["tracestate"] for fake in made.fakes] == ["x=1", "x=1"]
        for bad in ("", "junk", f"00-{'0' * 32}-{'cd' * 8}-01", f"ff-{'ab' * 16}-{'cd' * 8}-01"):
            await made.http.post("/generate", json={"text": "x"}, headers={"traceparent": bad})
            pair = {fake.seen[-1][2]["traceparent"].split("-")[1] for fake in made.fakes}
            assert len(pair) == 1
            assert not pair & {"ab" * 16, "0" * 32}


@in_loop
async def test_draining_lets_what_runs_finish_and_then_ends_it() -> None:
    """Each with the time it takes: on a busy machine what was to finish was once cut off."""
    async with world(worker=1, drain_timeout=PATIENCE_S) as made:
        fake = made.fakes[0]
        fake.gap = 0.05
        short = asyncio.create_task(bytes_of(made, "/generate", {"text": "x", "stream": True}))
        await until(lambda: len(fake.seen) == 1)
        drain = asyncio.create_task(made.router.drain())
        await asyncio.sleep(0)
        refusal(await made.http.post("/generate", json={"text": "x"}), 503)
        assert (await short)[1] == b"".join(fake.chunks)
        await drain
    async with world(worker=1, drain_timeout=0.1) as made:
        fake = made.fakes[0]
        fake.hang = True
        hung = asyncio.create_task(made.http.post("/generate", json={"text": "x"}))
        await until(lambda: len(fake.seen) == 1)
        await made.router.drain()
        assert "shut down" in refusal(await hung, 503)["message"]
        await until(lambda: bool(fake.left and fake.aborted))


@in_loop
async def test_connections_are_used_again() -> None:
    async with world(worker=1, interval=60) as made:
        for _ in range(5):
            await made.http.post("/generate", json={"text": "x"})
            await bytes_of(made, "/generate", {"text": "x", "stream": True})
            await until(made.idle)
        ports = {port for _, port in made.fakes[0].peers}
        assert len(made.fakes[0].seen) == 10
        assert len(ports) == 1


@in_loop
async def test_a_storm_of_leaving_clients_and_replaced_servers_leaves_nothing() -> None:
    chance = random.Random(1)
    async with world(prefill=2, decode=2, policy="least_loaded", threshold=2) as made:
        for fake in made.fakes:
            fake.gap, fake.lag = 0.02, 0.02

        async def one(number: int) -> int:
            await asyncio.sleep(chance.random() * 2)
            body = {"text": [str(number)] * chance.choice([1, 1, 3]), "stream": chance.random() < 0.5}
            wait = chance.random() * 0.2 if chance.random() < 0.6 else PATIENCE_S
            try:
                return (await made.http.post("/generate", json=body, timeout=wait)).status_code
            except httpx.TimeoutException:
                return 0

        async def replace() -> None:
            for _ in range(2):
                await asyncio.sleep(0.5)
                await made.of("prefill")[0].stop()
                await asyncio.sleep(0.2)
                made.of("prefill")[0].start()

        *codes, _ = await asyncio.gather(*(one(i) for i in range(200)), replace())
        assert set(codes) <= {0, 200, 502, 503}, set(codes)
        assert codes.count(200) > 40
        await until(made.idle)
        for server in made.router.fleet.servers:
            assert server.circuit._tries == 0
        await until(lambda: not made.router.aborts._running)
        await made.up()
        assert (await made.http.post("/generate", json={"text": "after"})).status_code == 200


@in_loop
async def test_a_connection_that_the_server_closed_meanwhile_costs_nothing() -> None:
    closing: list[asyncio.StreamWriter] = []
    answered = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        closing.append(writer)
        for _ in range(1 + (len(closing) > 1)):  # the first connection serves one request, and breaks on the next
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            answered += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    where = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connections = Connections(5.0)
    for _ in range(2):
        answer = await connections.send(where, "/generate", b"{}", {})
        assert [chunk async for chunk in answer.chunks()] == [b"ok"]
        await answer.close()
    assert (answered, len(closing)) == (2, 2)
    await connections.close()
    server.close()


@in_loop
async def test_a_request_that_a_server_died_of_is_given_to_no_other() -> None:
    async with world(worker=2, interval=60) as made:
        for _ in range(4):
            await made.http.post("/generate", json={"text": "x"})
        await until(made.idle)
        for fake in made.fakes:
            fake.die = True
        refusal(await made.http.post("/generate", json={"text": "deadly"}), 502)
        assert [len(fake.seen) for fake in made.fakes].count(3) == 1
