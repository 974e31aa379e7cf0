"""Each transfer engine carries hand-overs between a prefill and a decode server, as processes, for two pairs of
layouts: the answers are those of one rank."""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import calls
import tessera
from ports import free_port
from serve.processes import Running, running
from tessera.core.errors import ConfigError
from tessera.transfer.engines import make_engine

MODEL = "abacus-hybrid"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--port", "0", "--chunked-prefill-size", "48"]
FLAGS += ["--max-total-tokens", "8192"]
NARROW, WIDE = ["--tp", "1"], ["--tp", "2"]
SPREAD = ["--tp", "2", "--dp", "2", "--enable-dp-attention"]
HEAVY = pytest.mark.engines
PAIRS = [
    pytest.param("nixl", WIDE, NARROW, id="nixl-2-to-1"),
    pytest.param("nixl", NARROW, WIDE, id="nixl-1-to-2", marks=HEAVY),
    pytest.param("local", WIDE, SPREAD, id="local-2-to-1x2", marks=HEAVY),
    pytest.param("local", NARROW, WIDE, id="local-1-to-2", marks=HEAVY),
    pytest.param("mooncake", WIDE, NARROW, id="mooncake-2-to-1", marks=HEAVY),
    pytest.param("mooncake", SPREAD, WIDE, id="mooncake-1x2-to-2", marks=HEAVY),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def asked_and_wanted() -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Prompts of up to four chunks and more, and what one rank answers."""
    with tessera.Engine(MODEL, device="cpu", dtype="float32", max_total_tokens=8192) as engine:
        asked = []
        for i in range(8):
            words = " ".join(str((37 * i + 11 * j) % 100) for j in range(3 + 30 * (i % 4)))
            ids = engine.conversation([{"role": "user", "content": f"What is the largest of {words}?"}])
            params = {"temperature": 0.7 * (i % 2), "sampling_seed": i, "max_new_tokens": 24}
            asked.append({"input_ids": ids, "sampling_params": params})
        return asked, [engine.generate(**body)["output_ids"] for body in asked]


@pytest.mark.parametrize(("kind", "prefill", "decode"), PAIRS)
def test_answers_are_those_of_one_rank(
    asked_and_wanted: tuple[list[dict[str, Any]], list[list[int]]],
    tmp_path: Path,
    kind: str,
    prefill: list[str],
    decode: list[str],
) -> None:
    try:
        make_engine(kind).close()
    except ConfigError as error:
        pytest.skip(str(error))
    asked, wanted = asked_and_wanted
    bootstrap = free_port()
    command = [sys.executable, "-m", "tessera.cli", "serve", "--model-path", MODEL, *FLAGS]
    command += ["--disaggregation-transfer-backend", kind, "--disaggregation-mode"]
    sides = {
        "prefill": [*command, "prefill", "--disaggregation-bootstrap-port", str(bootstrap), *prefill],
        "decode": [*command, "decode", *decode],
    }
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(line, tmp_path / f"{name}.log")) for name, line in sides.items()]
        urls = [ready(server) for server in servers]
        rooms = [
            {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap, "bootstrap_room": 70 + i} for i in range(8)
        ]
        with ThreadPoolExecutor(16) as pool:
            legs = [
                [pool.submit(ask, url, body | room) for url in urls] for body, room in zip(asked, rooms, strict=True)
            ]
            answers = [[leg.result() for leg in pair] for pair in legs]
    assert all(answer.status_code == 200 for pair in answers for answer in pair), [a.text for p in answers for a in p]
    assert [decoded.json()["output_ids"] for _, decoded in answers] == wanted


def ready(server: Running) -> str:
    server.wait_for("ready to roll", 120)
    return server.ready()


def ask(url: str, body: dict[str, Any]) -> httpx.Response:
    return calls.post(f"{url}/generate", json=body, timeout=120)
