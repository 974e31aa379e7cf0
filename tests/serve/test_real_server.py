"""`tessera serve` with a real engine: two layers of noise behind HTTP, with every check on at every step."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import calls
from serve.processes import Running, gone, model_folder, running
from serve.test_processes import in_flight
from waits import wait_until

FLAGS = """--load-format dummy --device cpu --port 0 --served-model-name tiny --page-size 4 --max-total-tokens 640
--max-running-requests 16 --chunked-prefill-size 64 --enable-mixed-chunk --debug-checks --decode-log-interval 5"""

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True}


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tessera.cli", "serve", "--model-path", str(folder), *FLAGS.split()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = model_folder(tmp_path_factory.mktemp("model"))
    with running(command(folder), folder / "log") as started:
        started.ready()
        engine = started.engine()
        yield started
        started.signal(signal.SIGTERM)
        assert started.code() == 0
        gone(engine)
        assert "Traceback" not in started.text


@pytest.fixture(scope="module")
def url(server: Running) -> str:
    return server.ready()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


def metrics(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(calls.get(f"{url}/metrics").text)
    return {s.name.removeprefix("tessera:"): s.value for f in families for s in f.samples if "le" not in s.labels}


def test_the_openai_client_completes(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**ask, n=2, logprobs=3)
    assert [c.index for c in whole.choices] == [0, 1]
    first, second = whole.choices
    assert first.text == second.text, "greedy"
    assert first.logprobs is not None
    assert len(first.logprobs.token_logprobs or []) == 12
    assert all(len(top) in (3, 4) for top in first.logprobs.top_logprobs or [])
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    options = {"include_usage": True}
    parts = list(client.completions.create(**ask, stream=True, stream_options=options))  # type: ignore[call-overload]
    assert "".join(part.choices[0].text for part in parts if part.choices) == first.text
    assert parts[-1].usage.completion_tokens == 12
    scored = client.completions.create(model="tiny", prompt="Once upon", max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.token_logprobs or []) == len("Once upon")


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**ask)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [2] * 12
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content), "greedy takes the likeliest"
    parts = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_openai_client_sees_errors_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=101)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_a_seed_repeats_what_is_drawn(url: str) -> None:
    def drawn(seed: int) -> list[int]:
        params = {"max_new_tokens": 20, "temperature": 1, "seed": seed}
        return calls.post(f"{url}/generate", json={"text": "x", "sampling_params": params}).json()["output_ids"]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_two_requests_with_one_prefix_show_a_hit(url: str) -> None:
    calls.post(f"{url}/flush_cache")
    before = metrics(url)
    prefix = "a prefix that both of them share, longer than several pages"
    answers = [
        calls.post(f"{url}/v1/completions", json={"prompt": prefix + end, "max_tokens": 2}).json() for end in ("A", "B")
    ]
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, len(prefix) // 4 * 4]
    after = metrics(url)
    assert after["cached_tokens_total"] - before["cached_tokens_total"] == cached[1]
    assert after["cache_hit_rate"] > 0


def test_a_prompt_too_long_for_the_pool_is_refused_and_too_long_for_the_model_too(url: str) -> None:
    found = calls.post(f"{url}/v1/completions", json={"prompt": "a" * 600})
    assert found.status_code == 400
    assert "the context is 512 tokens" in found.json()["error"]["message"]


@pytest.mark.parametrize("leaves", [True, False])
def test_a_request_that_is_left_or_aborted_stops_in_the_engine(url: str, leaves: bool) -> None:
    def steps() -> float:
        text = calls.get(f"{url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if "step_time_seconds_count" in line)

    def stopped() -> bool:
        before = steps()
        with calls.stream("POST", f"{url}/v1/completions", json={**LONG, "rid": "long"}) as response:
            parts = response.iter_text()
            next(parts)
            if not leaves:
                calls.post(f"{url}/abort_request", json={"rid": "long"})
                if '"finish_reason":"abort"' not in "".join(parts):
                    return False
        wait_until(lambda: metrics(url)["num_running_reqs"] == 0)
        return steps() - before < LONG["max_tokens"] / 2

    assert any(stopped() for _ in range(4)), "on a busy machine the answer may be over before the client gets its turn"
    assert metrics(url)["num_used_tokens"] == 0


EXTREMES: dict[str, list[Any]] = {
    "temperature": [0, 1e-300, 1e-8, 100],
    "top_p": [1e-300, 1],
    "top_k": [-1, 1, 1 << 31],
    "min_p": [1e-300, 1],
    "repetition_penalty": [1e-300, 2],
    "presence_penalty": [-2, 2],
    "logit_bias": [{str(i): bias for i in range(259)} for bias in (-100, 100)],
    "seed": [-(1 << 63), (1 << 64) - 1],
    "stop_token_ids": [[], list(range(259))],
    "logprobs": [0, 20],
    "best_of": [1, 5],
    "priority": [-(1 << 31), 1 << 31],
}


def test_extreme_values_do_not_take_the_engine_down(url: str) -> None:
    rng = random.Random(0)

    async def play() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            chosen = [{name: rng.choice(EXTREMES[name]) for name in rng.sample(list(EXTREMES), 5)} for _ in range(60)]
            body = {"prompt": "ab", "max_tokens": 8, "ignore_eos": True}
            return await asyncio.gather(*(http.post("/v1/completions", json={**body, **c}) for c in chosen))

    assert [r.text for r in asyncio.run(play()) if r.status_code != 200] == []
    assert calls.get(f"{url}/health_generate").status_code == 200


def test_a_thousand_requests_with_aborts_and_disconnects_leave_every_page_free(server: Running, url: str) -> None:
    rng = random.Random(0)
    count = 1000

    async def one(http: httpx.AsyncClient, index: int, gate: asyncio.Semaphore) -> int:
        # Some share a prefix, some fork, some are longer than a chunk; they may be aborted, left or read to the end.
        prompt = rng.choice(["shared words in front ", "", "x" * 70]) + str(index)
        body = {
            "prompt": prompt,
            "max_tokens": rng.choice([1, 12, 24, 150]),
            "n": rng.choice([1, 1, 1, 2]),
            "ignore_eos": True,
        }
        fate = rng.random()
        async with gate:
            if fate < 0.25:  # leaves
                try:
                    await http.post("/v1/completions", json=body, timeout=rng.random() * 0.1)
                except httpx.TimeoutException:
                    return 0
            elif fate < 0.5:  # leaves a stream after some events
                async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    left = rng.randint(1, 10)
                    async for _ in response.aiter_lines():
                        left -= 1
                        if left == 0:
                            break
            elif fate < 0.75:  # is aborted by its id
                body["rid"] = f"r{index}"
                call = asyncio.create_task(http.post("/v1/completions", json=body))
                await asyncio.sleep(rng.random() * 0.05)
                await http.post("/abort_request", json={"rid": body["rid"]})
                return (await call).status_code
            else:
                return (await http.post("/v1/completions", json=body)).status_code
        return 200

    async def play() -> list[int]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            gate = asyncio.Semaphore(48)
            return await asyncio.gather(*(one(http, i, gate) for i in range(count)))

    statuses = asyncio.run(play())
    assert set(statuses) <= {0, 200}, statuses
    assert statuses.count(200) > count / 3
    wait_until(lambda: metrics(url)["num_running_reqs"] == 0)
    calls.post(f"{url}/flush_cache")
    wait_until(lambda: metrics(url)["num_cached_pages"] == 0)
    found = metrics(url)
    for name in ("num_running_reqs", "num_queue_reqs", "num_used_tokens", "token_usage", "slot_usage"):
        assert found[name] == 0, name
    assert found["num_preemptions_total"] > 0, "the pool is too large to test anything"
    assert in_flight(url) == 0
    assert "kind: MIXED" in server.text
    assert "Decode batch. #running-req: " in server.text


def test_the_engine_killed_is_a_503_and_a_failed_server(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    with running(command(folder), folder / "log") as server:
        url = server.ready()
        with calls.stream("POST", f"{url}/v1/completions", json=LONG) as r:
            parts = r.iter_text()
            next(parts)
            server.engine().kill()
            assert "ended by SIGKILL" in "".join(parts)
        assert server.code() == 1
        assert "tessera: the engine process was ended by SIGKILL" in server.text


def test_a_profile_is_started_and_stopped_with_or_without_a_body(server: Running, url: str, tmp_path: Path) -> None:
    began = calls.get(f"{url}/start_profile").json()
    assert began["output_dir"] == "/tmp", "the default"
    (file,) = calls.get(f"{url}/stop_profile").json()["files"]
    assert Path(file).name == f"{began['profile_id']}-TP-0.trace.json.gz"
    Path(file).unlink()
    for body, why in (
        ({"output_dir": "/dev/null/x"}, "the folder '/dev/null/x' cannot be written"),
        ({"activities": ["CPU", "MEM"]}, "activities[1]: found 'MEM', allowed is one of 'CPU', 'GPU'"),
        ({"merge_profiles": True}, "merge_profiles is not supported by this server"),
        ({"profile_id": "../x"}, "profile_id: found '../x', allowed is letters"),
        ({"num_step": 1}, "did you mean 'num_steps'?"),
    ):
        answer = calls.post(f"{url}/start_profile", json=body)
        assert answer.status_code == 400
        assert why in answer.json()["error"]["message"]
    refused = calls.post(f"{url}/stop_profile")
    assert (refused.status_code, "no profile runs" in refused.text) == (400, True)
    body = {"output_dir": str(tmp_path), "num_steps": 2, "profile_id": "x", "merge_profiles": False}
    assert calls.post(f"{url}/start_profile", json=body).status_code == 200
    calls.post(f"{url}/generate", json={"text": "x", "sampling_params": {"max_new_tokens": 4}})
    wait_until((tmp_path / "x-TP-0.trace.json.gz").is_file)


def test_bench_profiles_the_server(server: Running, url: str, tmp_path: Path) -> None:
    asked = [
        "--url",
        url,
        "--num-prompts",
        "3",
        "--output-len",
        "4",
        "--profile",
        "--profile-output-dir",
        str(tmp_path),
    ]
    for more, told in ((["--profile-num-steps", "2"], False), ([], True)):
        bench = [sys.executable, "-m", "tessera.cli", "bench", *asked, *more, "--disable-tqdm"]
        wait_until(lambda: "no profile runs" in calls.post(f"{url}/stop_profile").text)
        ran = subprocess.run(bench, capture_output=True, text=True, timeout=90, check=True)
        assert ("The profile is in" in ran.stderr) == told
    wait_until(lambda: len(list(tmp_path.glob("[!.]*-TP-0.trace.json.gz"))) == 2)
