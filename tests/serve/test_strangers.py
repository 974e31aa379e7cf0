"""An instance that serves is not ended by who comes too late, does not belong to it, or speaks another language."""

from __future__ import annotations

from pathlib import Path

import calls
from ports import free_port
from run.test_hub import rubbish
from serve.processes import model_folder, running
from serve.test_real_server import command


def answers(url: str) -> None:
    found = calls.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 5})
    assert found.status_code == 200, found.text


def test_who_is_turned_away_from_an_instance_that_serves_leaves_it_serving(tmp_path: Path) -> None:
    folder, port = model_folder(tmp_path), free_port()
    hosts = [*command(folder), "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{port}"]
    second = [*hosts, "--tp", "2", "--node-rank", "1"]
    wide = [*hosts, "--tp", "4", "--node-rank", "1"]
    with running(second, folder / "second") as other, running([*hosts, "--tp", "2"], folder / "log") as first:
        url = first.ready()
        rubbish(port)
        answers(url)
        with running(second, folder / "late") as late, running(wide, folder / "wide") as wider:
            assert (late.code(), wider.code()) == (1, 1)
        answers(url)
        assert other.process.poll() is None
    assert "--node-rank 1: two hosts have it: process" in late.text
    assert "--tp-size of host 1: found 4, the first host has 2" in wider.text
    for text in (late.text, wider.text, first.text):
        assert "Traceback" not in text
    assert first.text.count("comes too late and is turned away: ") == 3, "one for each rank"
