"""`tessera router` as a command: what is refused, and a whole life as a process."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

import calls
from commands.support import COMMAND, run
from ports import free_port
from serve.processes import running
from serve.router.fake_cli import __file__ as FAKE
from waits import wait_until


def test_what_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "router", "--prefill", "a:1", "x", "--worker", "b", "c", "b", "--max-body-size", "q")
    assert code == 2
    for text in (
        "--prefill a:1 x: found no bootstrap port",
        "--worker with --prefill or --decode: a router serves one kind",
        "http://b: named more than once",
        "--max-body-size q: expected bytes",
    ):
        assert text in err
    for argv, text in (
        ([], "no server was named. Give --prefill and --decode, or --worker."),
        (["--worker", "a:99999"], "--worker a:99999: it is no address of a server"),
        (["--worker", "a:b"], "--worker a:b: it is no address of a server"),
        (["--prefill", "a"], "--prefill with no --decode: there are no pairs"),
        (["--decode", "ftp://x"], "--decode ftp://x: it is no address of a server"),
        (["--worker", "a", "--polcy", "x"], "--polcy: there is no such flag here. Did you mean --policy?"),
        (["--worker", "a", "--page-size", "x"], "--page-size: there is no such flag here"),
    ):
        code, _, err = run(capsys, "router", *argv)
        assert (code, text in err) == (2, True), err


def test_a_router_comes_up_routes_and_ends_at_a_signal(tmp_path: Path) -> None:
    port = free_port()
    worker = [sys.executable, FAKE, "serve", "--host", "127.0.0.1", "--port", str(port)]
    router = [*COMMAND, "router", "--worker", f"127.0.0.1:{port}/v1", "--port", "0", "--log-requests"]
    with running(router, tmp_path / "router") as front:
        url = front.wait_for(r"Routing at (http://\S+)")[1]
        assert calls.get(f"{url}/health").status_code == 503
        with running(worker, tmp_path / "worker"):
            wait_until(lambda: calls.get(f"{url}/health").status_code == 200)
            assert calls.post(f"{url}/generate", json={"text": "x"}).json()["role"] == "worker"
        wait_until(lambda: calls.get(f"{url}/health").status_code == 503)
        front.signal(signal.SIGTERM)
        assert front.code() == 0
        assert re.search(r"worker http://127.0.0.1:\d+ is down: /health: ConnectError", front.text)
        assert "Traceback" not in front.text
        assert "Trace: POST /generate trace=" in front.text


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with running([*COMMAND, "router", "--worker", "a", "--port", "0"], tmp_path / "first") as first:
        port = first.wait_for(r"Routing at http://\S+:(\d+)")[1]
        with running([*COMMAND, "router", "--worker", "a", "--port", port], tmp_path / "second") as second:
            assert second.code() == 2
            assert f"--port {port}: cannot listen there" in second.text
