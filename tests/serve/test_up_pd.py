"""`tessera up` with prefill and decode apart: answers are those of one rank, and a killed worker is replaced."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

import calls
from commands.support import COMMAND
from serve.processes import Running, gone, running
from tessera import Engine
from waits import wait_until

RECIPE = Path(__file__).parents[2] / "recipes" / "abacus-cpu.yaml"
# Half as many ranks as the recipe has, for small machines: attention TP 2 to 1, float32 so that tokens are equal.
SMALL = ["*.tp-size=2", "*.dtype=float32", "*.max-running-requests=8", "*.log-level=info"]
PROMPTS = [
    "Ann has 17 apples. Ann buys 25 more. How many apples does Ann have now?",
    "Ben has 3 pears. " * 40,
    "Once",
]
GREEDY = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with Engine("abacus-hybrid", device="cpu", dtype="float32", max_total_tokens=4096) as engine:
        return [answer["output_ids"] for answer in engine.generate(PROMPTS, GREEDY)]


def ask(url: str, text: Any, **more: Any) -> httpx.Response:
    return calls.post(f"{url}/generate", json={"text": text, "sampling_params": GREEDY, **more})


def all_right(url: str, expected: list[list[int]]) -> None:
    batch = ask(url, PROMPTS)
    assert batch.status_code == 200, batch.text
    assert [answer["output_ids"] for answer in batch.json()] == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert ask(url, prompt).json()["output_ids"] == tokens
    streamed = ask(url, PROMPTS[0], stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert str(expected[0]) in streamed.text.replace(",", ", ").replace(",  ", ", ")


def started(tmp_path: Path, *more: str) -> list[str]:
    changes = [word for change in SMALL for word in ("--set", change)]
    return [*COMMAND, "up", str(RECIPE), "--port", "0", "--start-timeout", "120", *changes, *more]


def url_of(server: Running) -> str:
    return server.wait_for(r"processes are ready: (http://\S+)", 120)[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_pair_answers_as_one_rank_and_a_killed_prefill_server_is_replaced(
    tmp_path: Path, expected: list[list[int]]
) -> None:
    with running(started(tmp_path, "--on-failure", "restart"), tmp_path / "log") as server:
        url = url_of(server)
        all_right(url, expected)
        assert "kind: PREBUILT" in server.text
        below = server.programs()
        front = next(one for one, words in below.items() if {"serve", "prefill"} <= set(words))
        front.kill()
        server.wait_for("prefill-0 was ended by SIGKILL", 20)
        wait_until(lambda: ask(url, PROMPTS[2]).status_code == 200, 90)
        all_right(url, expected)
        assert server.text.count("decode-0 starts") == 1, "decode went on"
        below = [*below, *server.children()]
        server.signal(signal.SIGINT)
        assert server.code() == 0
        for one in below:
            gone(one)
        assert "Traceback" not in server.text
