"""Endpoints around generation, and that health, metrics and log lines tell the truth."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.support import World, in_loop, refusal, world
from tessera.core.messages import Flush, StepReport
from tessera.serve.metrics import Metrics
from tessera.serve.steplog import StepLog
from waits import until

PATH = "/v1/completions"
T = TypeVar("T")


@in_loop
async def test_the_model_is_listed() -> None:
    async with world() as (_, http):
        listed = (await http.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["tiny"]
        assert (await http.get("/v1/models/tiny")).json() == listed["data"][0]
        refusal(await http.get("/v1/models/other"), 404)
        for path in ("/model_info", "/get_model_info"):
            info = (await http.get(path)).json()
            assert (info["model_path"], info["context_length"], info["is_generation"]) == ("some/path", 512, True)
        for path in ("/server_info", "/get_server_info"):
            info = (await http.get(path)).json()
            assert info["config"] == {"tp_size": 1}
            assert info["state"]["ready"] is True


@in_loop
async def test_text_to_tokens_and_back() -> None:
    async with world() as (_, http):
        found = (await http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == ([104, 195, 169], 3, 512)
        assert found["token_strs"] == ["h", "\ufffd", "\ufffd"]
        back = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()
        assert back["text"] == back["prompt"] == "hé"
        talk = {"messages": [{"role": "user", "content": "x"}]}
        assert (await http.post("/tokenize", json=talk)).json()["tokens"][0] == 257
        assert refusal(await http.post("/tokenize", json={"prompt": 3}))["param"] == "prompt"
        assert refusal(await http.post("/tokenize", json={}))["param"] == "prompt"
        assert refusal(await http.post("/detokenize", json={}))["param"] == "tokens"
        assert refusal(await http.post("/detokenize", json={"tokens": ["a"]}))["param"] == "tokens[0]"


@in_loop
async def test_the_cache_is_flushed() -> None:
    async with world() as (made, http):
        for method in ("GET", "POST"):
            assert (await http.request(method, "/flush_cache")).json() == {"flushed": True}
        await until(lambda: made.engine.seen == [Flush(), Flush()])


@in_loop
async def test_health_says_503_until_warm_while_draining_and_when_the_loop_is_silent() -> None:
    async with world(silence=0.1) as (made, http):
        health = (await http.get("/health")).json()
        assert health["status"] == "ok"
        assert health["last_step_age_s"] < 0.1
        assert (await http.get("/health_generate")).json()["status"] == "ok"
        warm = made.client.replicas[0].warm
        for cold, draining in ((True, False), (False, True)):
            (warm.clear if cold else warm.set)()
            made.server.draining = draining
            refusal(await http.get("/health"), 503)
            refusal(await http.post(PATH, json={"prompt": "a"}), 503)
            refusal(await http.get("/health_generate"), 503)
        made.server.draining = False
        assert (await http.get("/health")).status_code == 200
        await until(lambda: made.client.replicas[0].stale)
        error = refusal(await http.get("/health"), 503)
        assert "has not ticked" in error["message"]


@in_loop
async def test_health_generate_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tessera.serve.admin.PROBE_SECONDS", 0.1)
    async with world() as (made, http):
        made.engine.hung = True
        assert "no token within" in refusal(await http.get("/health_generate"), 503)["message"]
        await until(lambda: not made.engine.rows)


@in_loop
async def test_an_engine_that_goes_silent_fails_what_is_in_flight_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with world(silence=0.2) as (made, http):
        made.paused = True  # and stays so: one that only hangs wakes when what it hangs in is aborted

        async def ask_all() -> list[httpx.Response]:
            found = await asyncio.gather(*(http.post(PATH, json={"prompt": "a"}) for _ in range(6)))
            await asyncio.sleep(0.3)
            return found

        for response in await _while_watched(made, ask_all()):
            assert "has not stepped" in refusal(response, 503)["message"]
        assert [r.levelname for r in caplog.records if "has not stepped" in r.getMessage()] == ["ERROR"]


async def _while_watched(made: World, call: Coroutine[Any, Any, T]) -> T:
    watch = asyncio.create_task(made.client.watch(0.05))
    try:
        return await call
    finally:
        watch.cancel()


@in_loop
async def test_metrics_count_what_was_served() -> None:
    async with world() as (_, http):
        for _ in range(3):
            await http.post(PATH, json={"prompt": "abcd", "max_tokens": 5})
        await http.post(PATH, json={"prompt": "abcd", "max_tokens": 100})
        text = (await http.get("/metrics")).text
    found = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["tessera:prompt_tokens_total", None] == 16
    assert found["tessera:cached_tokens_total", None] == 8
    assert found["tessera:cache_hit_rate", None] == 0.5
    assert found["tessera:num_requests_total", "length"] == 3
    assert found["tessera:num_requests_total", "stop"] == 1
    tokens = 3 * 5 + len("The answer is 42. Grüße, 世界 🎉! ".encode()) + 1
    assert found["tessera:generation_tokens_total", None] == tokens
    assert found["tessera:time_to_first_token_seconds_count", None] == 4
    assert found["tessera:inter_token_latency_seconds_count", None] == tokens - 4
    assert found["tessera:e2e_request_latency_seconds_count", None] == 4
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "num_preemptions_total"):
        assert (f"tessera:{name}", None) in found


def report(**more: float) -> StepReport:
    """A step of decoding, unless told otherwise."""
    values = dict.fromkeys(StepReport.__struct_fields__, 0)
    values |= {"index": 1, "label": "DECODE", "num_pages": 100, "num_running": 8, "num_output_token": 8}  # type: ignore[dict-item]
    return StepReport(**{**values, "seconds": 0.5, **more})  # type: ignore[arg-type]


def test_a_step_of_several_ranks_is_one_step() -> None:
    metrics = Metrics("tiny", num_dp=2)
    for dp_rank, busiest, label in ((0, False, "IDLE"), (1, True, "EXTEND"), (0, True, "DECODE"), (1, False, "DECODE")):
        metrics.step(report(dp_rank=dp_rank, busiest=busiest, label=label))  # type: ignore[arg-type]
    lines = [
        line for line in metrics.text().decode().splitlines() if line.startswith("tessera:step_time_seconds_count")
    ]
    assert {(line.split('kind="')[1].split('"')[0], line.split()[-1]) for line in lines} == {
        ("EXTEND", "1.0"),
        ("DECODE", "1.0"),
    }


def test_prefill_and_decode_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tessera")
    lines = StepLog(interval=4)
    mixed = {"num_new_seq": 2, "num_new_token": 256, "num_cached_token": 64, "num_queued": 3, "num_pages_used": 30}
    lines(report(label="MIXED", num_cached_pages=5, **mixed))  # type: ignore[arg-type]
    assert caplog.messages == [
        (
            "Prefill batch. #new-seq: 2, #new-token: 256, #cached-token: 64, token usage: 0.25, #running-req: 6, "
            "#queue-req: 3, kind: MIXED"
        )
    ]
    caplog.clear()
    for _ in range(7):
        lines(report(num_slots=10, num_slots_used=5))
    assert caplog.messages == [
        (
            "Decode batch. #running-req: 8, token usage: 0.00, slot usage: 0.50, gen throughput (token/s): 16.00, "
            "#queue-req: 0"
        )
    ]
