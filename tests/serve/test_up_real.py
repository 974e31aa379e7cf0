"""`tessera up` with real servers: it answers, ends at Ctrl-C with all it started, and when one of them is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import calls
from commands.support import COMMAND
from serve.processes import Running, gone, model_folder, running
from waits import wait_until

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--set", "*.load-format=dummy", "--set", "*.max-total-tokens=512", "--set", "*.max-running-requests=4"]


def answer(server: Running) -> str:
    url = server.wait_for(r"processes are ready: (http://\S+)", 60)[1]
    body = {"prompt": "Once upon", "max_tokens": 8, "temperature": 0}
    found = calls.post(f"{url}/v1/completions", json=body)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


@pytest.mark.parametrize(
    "how", ["Ctrl-C", "Ctrl-C while some are stopped", "two signals", "killed worker", "killed itself"]
)
def test_replicas(tmp_path: Path, how: str) -> None:
    model = ["--set", f"*.model-path={model_folder(tmp_path)}"]
    command = [*COMMAND, "up", str(RECIPES / "abacus-replicas.yaml"), "--port", "0", *model, *SMALL]
    with running(command, tmp_path / "log") as server:
        assert answer(server) == answer(server)
        wait_until(lambda: len(server.children()) == 5)  # two fronts, two engines, a router
        below = server.programs()
        if how.startswith("Ctrl-C"):
            fronts = [one for one, words in below.items() if "serve" in words]
            engines = [one for one in below if one.ppid() in [front.pid for front in fronts]]
            for one in (fronts[0], engines[1]) if how != "Ctrl-C" else ():
                one.suspend()
            server.signal(signal.SIGINT)
            assert server.code() == 0
        elif how == "two signals":
            server.signal(signal.SIGINT)
            server.signal(signal.SIGTERM)
            assert server.code() in (128 + signal.SIGINT, 128 + signal.SIGTERM), "whichever came second"
        elif how == "killed worker":
            next(one for one, words in below.items() if "serve" in words).kill()
            assert server.code() == 1
            assert "was ended by SIGKILL, maybe because memory ran out, so everything ends" in server.text
        else:
            server.process.kill()
        for one in below:
            gone(one)
        assert "Traceback" not in server.text
