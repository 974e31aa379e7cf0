"""Front and engine as two processes: they start, drain, fail and end together, in every phase."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

import calls
from ports import free_port
from serve.processes import fake_server, gone, health, model_folder
from serve.support import in_loop
from tessera.run.children import WIRES
from tessera.serve.process import EngineProcess
from waits import NOTICED_S, PATIENCE_S, wait_until

LONG = {"prompt": "a", "max_tokens": 300, "ignore_eos": True}
SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path)


class Asking(threading.Thread):
    """A request under way in a thread: its status, and its text as it came."""

    def __init__(self, url: str, **more: Any) -> None:
        super().__init__()
        self.url, self.body = url, {**LONG, **more}
        self.status, self.text = 0, ""
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        with calls.stream("POST", f"{self.url}/v1/completions", json=self.body) as response:
            self.status = response.status_code
            for part in response.iter_text():
                self.text += part
                self.begun.set()


def in_flight(url: str) -> int:
    """Requests that the server has taken and not answered."""
    return int(calls.get(f"{url}/server_info").json()["state"]["in_flight"])


@SIGNALS
def test_a_server_answers_and_ends_at_a_signal(folder: Path, number: signal.Signals) -> None:
    with fake_server(folder) as server:
        url = server.ready()
        engine = server.engine()
        answer = calls.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 10}).json()
        assert answer["choices"][0]["text"] == "The answer"
        assert "#new-seq" in server.text
        assert f"curl {url}" in server.text
        assert server.text.count("max-queued-requests: ") == 1, "decisions are printed once"
        wire = Path(engine.cmdline()[-2])
        assert not wire.exists(), "the folder of the wire is gone as soon as both ends have met"
        server.signal(number)
        assert server.code() == 0
        gone(engine)


def test_the_front_loads_no_torch(folder: Path) -> None:
    with fake_server(folder) as server:
        server.ready()
        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "tokenizers" in maps
        assert "libtorch" not in maps


def test_what_runs_finishes_before_the_end_and_nothing_new_is_taken(folder: Path) -> None:
    held = folder / "held"
    with fake_server(folder, {"HOLD": str(held)}) as server:
        url = server.ready()
        held.touch()
        asking = Asking(url, stream=True)
        wait_until(lambda: in_flight(url) == 1)
        server.signal(signal.SIGTERM)
        wait_until(lambda: health(url) == 503)
        assert calls.post(f"{url}/v1/completions", json=LONG).status_code == 503
        held.unlink()
        assert server.code() == 0
        asking.join(PATIENCE_S)
        assert '"finish_reason":"length"' in asking.text
        assert asking.text.endswith("data: [DONE]\n\n")


def test_what_does_not_finish_in_time_is_aborted(folder: Path) -> None:
    with fake_server(folder, {"DELAY": "0.1"}, drain_timeout=0.3) as server:
        asking = Asking(server.ready(), stream=True)
        assert asking.begun.wait(PATIENCE_S)
        server.signal(signal.SIGTERM)
        assert server.code() == 0
        asking.join(PATIENCE_S)
        assert '"finish_reason":"abort"' in asking.text
        assert asking.text.endswith("data: [DONE]\n\n")


def test_a_second_signal_ends_it_now(folder: Path) -> None:
    with fake_server(folder, {"DELAY": "0.1"}) as server:
        url, engine = server.ready(), server.engine()
        quick = httpx.Client()
        with quick.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as response:
            next(response.iter_raw())
            server.signal(signal.SIGINT)
            server.wait_for("SIGINT: ending in order")
            server.signal(signal.SIGTERM)
            assert server.code() == 128 + signal.SIGTERM
        gone(engine)


def test_the_end_of_the_engine_fails_what_is_in_flight_and_the_server(folder: Path) -> None:
    with fake_server(folder, {"DELAY": "0.05"}) as server:
        url = server.ready()
        whole, streamed = Asking(url), Asking(url, stream=True)
        assert streamed.begun.wait(PATIENCE_S)
        wait_until(lambda: in_flight(url) == 2)
        engine = server.engine()
        began = time.monotonic()
        engine.kill()
        assert server.code() == 1
        assert time.monotonic() - began < NOTICED_S
        whole.join(PATIENCE_S)
        streamed.join(PATIENCE_S)
        assert whole.status == 503
        assert "ended by SIGKILL" in whole.text
        assert '"type":"unavailable_error"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert "PeerError: the engine process was ended by SIGKILL" in server.text
        assert (server.text.count("SIGKILL"), "Traceback" in server.text) == (1, False), server.text


@pytest.mark.parametrize(("first", "why"), [(2, "the engine failed: asked to fail"), (3, "exit code 9")])
def test_an_engine_that_fails_says_why(folder: Path, first: int, why: str) -> None:
    with fake_server(folder) as server:
        found = calls.post(f"{server.ready()}/v1/completions", json={"prompt": [first]})
        assert found.status_code == 503
        assert why in found.json()["error"]["message"]
        assert server.code() == 1
        assert why in server.text


def test_the_engine_ends_with_its_front(folder: Path) -> None:
    with fake_server(folder) as server:
        server.ready()
        engine = server.engine()
        server.signal(signal.SIGKILL)
        gone(engine)


@SIGNALS
@pytest.mark.parametrize("phase", ["sleep", "slow"])
def test_a_signal_while_it_starts_leaves_nothing(folder: Path, number: signal.Signals, phase: str) -> None:
    with fake_server(folder, {"FAULT": phase}) as server:
        engine = server.engine()
        wire = Path(engine.cmdline()[-2])
        if phase == "slow":
            server.wait_for("Serving tiny with")
        else:
            assert wire.stat().st_mode & 0o77 == 0, "only its user may enter the folder of the wire"
        server.signal(number)
        assert server.code() == 0
        gone(engine)
        assert not wire.exists()


def test_health_says_503_while_the_model_is_loaded(folder: Path) -> None:
    port = free_port()
    with fake_server(folder, {"FAULT": "slow"}, port=port) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: health(url))
        assert health(url) == 503
        found = calls.post(f"{url}/v1/completions", json=LONG)
        assert found.status_code == 503
        assert "being loaded" in found.text
        assert calls.get(f"{url}/v1/models").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.code() == 0


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("refuse", 2, "ConfigError: - --tp-size 64"),
        ("prepare", 1, "TesseraError: the model cannot be found"),
        ("load", 1, "PeerError: the engine failed: ValueError: the checkpoint is broken"),
    ],
)
def test_a_start_that_fails_says_why(folder: Path, fault: str, code: int, says: str) -> None:
    with fake_server(folder, {"FAULT": fault}) as server:
        assert server.code() == code
        assert says in server.text
        assert ("Traceback" in server.text) == (fault == "load"), server.text


def test_loading_that_does_not_move_has_a_deadline(folder: Path) -> None:
    with fake_server(folder, {"FAULT": "slow", "PATIENCE": "0.5"}) as server:
        assert server.code() == 1
        assert "loading the model has not moved" in server.text


class Undying:
    """A process that the kernel does not clear away, as one that is inside a driver."""

    pid = 1 << 30

    def kill(self) -> None:
        """Nothing follows."""

    def poll(self) -> None:
        """It runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Never ends."""
        assert timeout is not None, "waited for without a deadline"
        raise subprocess.TimeoutExpired("it", timeout)


@in_loop
async def test_an_engine_that_cannot_be_killed_has_ended_all_the_same() -> None:
    """Known fault: the front waited for its end for ever, and answered nobody."""
    engine = EngineProcess([sys.executable, "-c", "import time; time.sleep(600)"])
    real, engine._process = engine._process, cast(Any, Undying())
    try:
        engine.kill()
        assert await asyncio.wait_for(engine.receive(), PATIENCE_S) is None
        assert engine.end() == "the engine process was killed and has not ended"
    finally:
        engine.close()
        real.kill()
        real.wait()


@in_loop
async def test_what_an_engine_leaves_is_cleared_away_once() -> None:
    """Its number may be another's later."""
    engine = EngineProcess(["true"])
    try:
        assert await asyncio.wait_for(engine.receive(), PATIENCE_S) is None
        engine.kill()
        others = Path(tempfile.mkdtemp(prefix=WIRES.format(engine.pid)))
    finally:
        engine.close()
    os.rmdir(others)


def test_an_address_in_use_is_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with fake_server(folder, port=port) as server:
            assert server.code() == 2
            assert re.search(rf"--port {port}: cannot listen there: Address already in use", server.text)
