"""`tessera.Engine`: SGLang's calls in this process, from threads, event loops and scripts that end as they like."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import tessera
from tessera.core.errors import ConfigError, ModelError, PeerError, RequestError
from tessera.models.folder import ASSETS
from tiny import QWEN3, all_free

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
FLAGS: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cpu",
    "max_running_requests": 8,
    "page_size": 4,
    "max_total_tokens": 2048,
}


def fill(folder: Path) -> Path:
    """A model folder without weights: a tiny model, and the packaged tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "abacus-hybrid" / name, folder)
    (folder / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": 512}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[tessera.Engine]:
    with tessera.Engine(model_path=str(folder), **FLAGS) as made:
        made.generate("warm", {"max_new_tokens": 1})  # its threads are the fixture's, not those of the first test
        yield made


def settled(engine: tessera.Engine) -> bool:
    """Nothing runs any more; waits a moment for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        core = engine._local.core
        if core.planner.idle and all_free(core) and not len(engine._local.client):
            return True
        time.sleep(0.01)
    return False


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, tessera; assert tessera.__version__; assert 'torch' not in sys.modules; tessera.Nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "AttributeError: module 'tessera' has no attribute 'Nothing'" in done.stderr


def test_one_prompt_gives_one_answer_and_a_list_a_list(engine: tessera.Engine) -> None:
    one = engine.generate("12 + 7 =", GREEDY)
    assert one["text"] == engine.tokenizer.decode(one["output_ids"])
    assert len(one["output_ids"]) == 6
    meta = one["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (6, 6)
    assert meta["finish_reason"] == {"type": "length", "length": 6}
    again = engine.generate(input_ids=engine.tokenizer.encode("12 + 7 ="), sampling_params=GREEDY)
    assert again["output_ids"] == one["output_ids"]
    many = engine.generate(["12 + 7 =", "a", "b"], [GREEDY, {**GREEDY, "max_new_tokens": 2}, GREEDY])
    assert [len(answer["output_ids"]) for answer in many] == [6, 2, 6]
    assert many[0]["output_ids"] == one["output_ids"]
    assert isinstance(engine.generate(["a"], GREEDY), list)
    assert len(engine.generate("a", {**GREEDY, "n": 3, "temperature": 1})) == 3
    assert settled(engine)


def test_logprobs_come_as_in_sglang(engine: tessera.Engine) -> None:
    meta = engine.generate("12 + 7 =", GREEDY, return_logprob=True, logprob_start_len=2, top_logprobs_num=2)[
        "meta_info"
    ]
    assert len(meta["input_token_logprobs"]) == 4
    assert [len(entry) for entry in meta["output_token_logprobs"]] == [3] * 6
    for (own, token, _), best in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert best[0][:2] == [own, token], "a greedy token is the likeliest"


def test_streams_grow_to_the_whole_answer(engine: tessera.Engine) -> None:
    whole = engine.generate("12 + 7 =", GREEDY)
    parts = list(engine.generate("12 + 7 =", GREEDY, stream=True))
    assert len(parts) > 2
    assert parts[-1]["output_ids"] == whole["output_ids"]
    assert parts[-1]["text"] == whole["text"]
    assert all(a["text"] == b["text"][: len(a["text"])] for a, b in pairwise(parts))
    both = list(engine.generate(["12 + 7 =", "b"], GREEDY, stream=True))
    assert {part["index"] for part in both} == {0, 1}
    assert [p for p in both if p["index"] == 0][-1]["output_ids"] == whole["output_ids"]


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_a_stream_that_is_left_ends_its_request(engine: tessera.Engine, leave: str) -> None:
    stream = engine.generate("12", {**GREEDY, "max_new_tokens": 200}, stream=True)
    next(stream)
    if leave == "close":
        stream.close()
    del stream
    assert settled(engine)
    engine.generate("12", GREEDY, stream=True)  # never begun
    assert settled(engine)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"prompt": "a", "input_ids": [1]}, "input_ids"),
        ({}, "text"),
        ({"prompt": "a", "sampling_params": {"temprature": 0}}, "temprature"),
        ({"prompt": "a", "sampling_params": {"max_new_tokens": 10_000}}, "max_new_tokens"),
        ({"input_ids": [512]}, "input_ids"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_asked_wrongly_is_refused_by_name_at_once(
    engine: tessera.Engine, asked: dict[str, Any], field: str, stream: bool
) -> None:
    with pytest.raises(RequestError, match=field):
        engine.generate(**asked, stream=stream)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("x", "messages: found 'x', allowed is a list of 1 to"),
        (7, "messages: found 7, allowed is a list of 1 to"),
        ({"role": "user", "content": "x"}, "messages: found an object of 2, allowed is a list of 1 to"),
        ([], "messages: found a list of 0, allowed is a list of 1 to"),
        (["x"], r"messages\[0\]: found 'x', allowed is an object"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], r"messages\[1\].role is missing"),
        ([{"role": "user", "content": "x", 3: 4}], r"unknown field 'messages\[0\].3'"),
    ],
)
def test_a_conversation_that_is_none_is_refused_by_name(engine: tessera.Engine, messages: Any, told: str) -> None:
    """Known fault: a bare ValueError of `dict`."""
    with pytest.raises(RequestError, match=told):
        engine.conversation(messages)
    good = MappingProxyType({"role": "user", "content": "x"})
    assert engine.conversation((good,)) == engine.conversation([dict(good)])


def test_sync_and_async_calls_work_inside_a_running_loop(engine: tessera.Engine) -> None:
    expected = engine.generate("12 + 7 =", GREEDY)["output_ids"]

    async def use() -> None:
        assert engine.generate("12 + 7 =", GREEDY)["output_ids"] == expected
        answers = await asyncio.gather(*(engine.async_generate("12 + 7 =", GREEDY) for _ in range(5)))
        assert [answer["output_ids"] for answer in answers] == [expected] * 5
        parts = [part async for part in await engine.async_generate("12 + 7 =", GREEDY, stream=True)]
        assert parts[-1]["output_ids"] == expected
        with pytest.raises(RequestError):
            await engine.async_generate("a", {"top_p": 7})

    asyncio.run(use())
    assert settled(engine)


def test_a_cancelled_task_and_a_left_stream_end_their_requests(engine: tessera.Engine) -> None:
    async def use() -> None:
        task = asyncio.create_task(engine.async_generate("12", {**GREEDY, "max_new_tokens": 200}))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in await engine.async_generate("12", {**GREEDY, "max_new_tokens": 200}, stream=True):
            break

    asyncio.run(use())
    assert settled(engine)


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_ends_what_was_asked_for_and_leaves_the_engine_usable(engine: tessera.Engine, stream: bool) -> None:
    def ask() -> None:
        while True:  # an answer may be quicker than the signal
            found = engine.generate("12", {**GREEDY, "max_new_tokens": 240}, stream=stream)
            for _ in found if stream else ():
                pass

    main = threading.main_thread().ident or 0
    soon = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    soon.start()
    with pytest.raises(KeyboardInterrupt):
        ask()
    soon.join(10)
    assert settled(engine)
    assert len(engine.generate("12", GREEDY)["output_ids"]) == 6


def test_many_threads_get_their_own_answers(engine: tessera.Engine) -> None:
    texts = [f"{i} + {i + 3} =" for i in range(16)]
    expected = [engine.generate(text, GREEDY)["output_ids"] for text in texts]
    found: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        found[i] = engine.generate(texts[i], GREEDY)["output_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(16)] == expected


def test_more_requests_than_the_queue_of_a_server_takes(engine: tessera.Engine) -> None:
    short = {"temperature": 0, "max_new_tokens": 1}
    assert len(engine.generate(["a"] * 600, short)) == 600


def test_after_close_and_after_a_failure_errors_say_so(folder: Path) -> None:
    engine = tessera.Engine(str(folder), **FLAGS)
    stream = engine.generate("12", {**GREEDY, "max_new_tokens": 200}, stream=True)
    next(stream)
    engine.close()
    engine.shutdown()
    with pytest.raises(PeerError, match="closed"):
        engine.generate("a", GREEDY)
    with pytest.raises(PeerError, match="closed"):
        list(stream)
    with tessera.Engine(str(folder), **FLAGS) as engine:
        engine._local.core.runner.model.forward = None  # type: ignore[method-assign, assignment]
        for _ in range(3):
            with pytest.raises(PeerError, match="TypeError"):
                engine.generate("a", GREEDY)


def test_close_aborts_what_other_threads_wait_for(folder: Path) -> None:
    engine = tessera.Engine(str(folder), **FLAGS)
    found: list[Any] = []
    ask = threading.Thread(target=lambda: found.append(engine.generate("12", {**GREEDY, "max_new_tokens": 240})))
    ask.start()
    while not len(engine._local.client):
        time.sleep(0.001)
    engine.close()
    ask.join(10)
    assert found[0]["meta_info"]["finish_reason"] == {"type": "abort"}
    assert len(found[0]["output_ids"]) < 240


def test_bad_starts_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max-total-toke"):
        tessera.Engine(str(folder), **{**FLAGS, "max_total_toke": 1})
    with pytest.raises(ModelError, match="no such folder"):
        tessera.Engine("nothing-of-this-name")
    with pytest.raises(ModelError, match="safetensors"):
        tessera.Engine(str(folder), **{**FLAGS, "load_format": "auto"})


SCRIPTS = {
    "forgets to close": "print(engine.generate('12 +', params)['meta_info']['completion_tokens'])",
    "ends in an error while it streams": "next(engine.generate('12 +', long, stream=True))\nprint(6)\n1 / 0",
    "ends while a thread still asks": """
import threading, time
def ask():
    time.sleep(0.3)
    print(engine.generate('12 +', params)['meta_info']['completion_tokens'])
threading.Thread(target=ask).start()""",
    "ends while a daemon asks": """
import threading, time
threading.Thread(target=lambda: engine.generate('12 +', long), daemon=True).start()
time.sleep(0.2); print(6)""",
    "drops the engine": "print(engine.generate('12 +', params)['meta_info']['completion_tokens']); del engine",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_does_not_close_ends_all_the_same(script: str, folder: Path) -> None:
    code = f"""
import tessera
engine = tessera.Engine({str(folder)!r}, **{FLAGS!r})
params = {GREEDY!r}
long = {{**params, 'max_new_tokens': 240}}
{SCRIPTS[script]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["6"], done.stderr
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    assert errors == (["ZeroDivisionError: division by zero"] if "error" in script else []), done.stderr
    assert done.returncode == bool(errors)


def test_replicas_are_refused_by_name_and_with_what_to_do() -> None:
    with pytest.raises(
        ConfigError, match="--dp-size 2 with no --enable-dp-attention: an Engine in your process is one"
    ):
        tessera.Engine(model_path="abacus-hybrid", dp_size=2)


def test_a_profile_of_an_engine_in_this_process(engine: tessera.Engine, tmp_path: Path) -> None:
    began = engine.start_profile(output_dir=str(tmp_path), profile_id="7")
    assert (began["success"], began["profile_id"]) == (True, "7")
    with pytest.raises(RequestError, match="profile '7' runs; end it first"):
        engine.start_profile()
    engine.generate("12 + 7 =", GREEDY)
    assert engine.stop_profile()["files"] == [str(tmp_path / "7-TP-0.trace.json.gz")]
    assert (tmp_path / "7-TP-0.trace.json.gz").is_file()
    with pytest.raises(RequestError, match="no profile runs"):
        engine.stop_profile()
