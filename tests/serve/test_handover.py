"""A prefill server, a decode server and the router as processes: they answer as one engine does, survive the death of a
prefill server, and hold nothing afterwards."""

from __future__ import annotations

import contextlib
import re
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
from tessera.evals.tasks import TASKS
from waits import wait_until

MODEL = "abacus-hybrid"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--port", "0", "--chunked-prefill-size", "48"]
FLAGS += ["--max-total-tokens", "8192"]
PREFILL = ["--tp", "2"]
DECODE = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--ep", "2"]
CLI = [sys.executable, "-m", "tessera.cli"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def ready(server: Running) -> str:
    server.wait_for("ready to roll", 120)
    return server.ready()


class Deployment:
    """Two servers and a router. `stack` ends what is started."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack, self._count = folder, stack, 0
        self.bootstrap, self.port = free_port(), free_port()
        self.prefill = self.start_prefill()
        self.decode = self._start("decode", [*DECODE, "--disaggregation-mode", "decode"])
        self.url = {"prefill": ready(self.prefill), "decode": ready(self.decode)}
        command = ["--prefill", self.url["prefill"], "--decode", self.url["decode"], "--port", "0"]
        router = self._run("router", [*CLI, "router", *command, "--health-check-interval-secs", "0.5"])
        self.router = router.wait_for(r"Routing at (http://\S+)", 30)[1]

    def _run(self, name: str, command: list[str]) -> Running:
        self._count += 1
        return self._stack.enter_context(running(command, self.folder / f"{name}-{self._count}.log"))

    def _start(self, name: str, flags: list[str]) -> Running:
        return self._run(name, [*CLI, "serve", "--model-path", MODEL, *FLAGS, *flags])

    def start_prefill(self) -> Running:
        role = ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", str(self.bootstrap)]
        return self._start("prefill", [*PREFILL, *role, "--port", str(self.port)])

    def up(self) -> None:
        """Waits until the router has found both."""
        wait_until(lambda: calls.get(f"{self.router}/health").status_code == 200)

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        return calls.post(f"{self.router}/generate", json=body)

    def abort(self, body: dict[str, Any]) -> dict[str, int]:
        """How many requests of each server were ended."""
        answer = calls.post(f"{self.router}/abort_request", json=body).json()
        return {url: told["aborted"] for url, told in answer.items()}

    def held(self, role: str) -> float:
        """Tokens that a server's caches hold for requests, and its share of states."""
        text = calls.get(f"{self.url[role]}/metrics").text
        found = re.findall(r"^tessera:(?:num_used_tokens|slot_usage)\{[^}]*\} (\S+)", text, re.MULTILINE)
        assert found
        return sum(map(float, found))

    def all_free(self) -> None:
        wait_until(lambda: not self.held("decode") and not self.held("prefill"))


def bodies(engine: tessera.Engine, count: int) -> list[dict[str, Any]]:
    """Questions of the trained tasks, some after others, so that prompts are of several chunks; greedy and sampled."""
    texts = [question.prompt for name in ("gsm8k", "gpqa") for question in TASKS[name].questions("heldout", count)]
    made = []
    for i in range(count):
        ids = engine.conversation([{"role": "user", "content": "\n".join(texts[i : i + 1 + i % 4])}])
        params = {"temperature": 0.7 * (i % 2), "sampling_seed": i, "max_new_tokens": 40}
        made.append({"input_ids": ids, "sampling_params": params})
    return made


def test_a_deployment_answers_as_one_engine_and_survives_its_clients_and_a_prefill_server(tmp_path: Path) -> None:
    with tessera.Engine(MODEL, device="cpu", dtype="float32", max_total_tokens=8192) as engine:
        asked = bodies(engine, 24)
        wanted = [engine.generate(**body)["output_ids"] for body in asked]
    assert sum(map(len, wanted)) > 200
    assert max(len(body["input_ids"]) for body in asked) > 96, "three chunks of 48"
    with contextlib.ExitStack() as stack:
        deployment = Deployment(tmp_path, stack)
        deployment.up()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(deployment.ask, asked))
        check(answers, wanted)
        times_are_told(deployment, answers)
        deployment.all_free()
        clients_that_leave_hold_nothing(deployment)
        a_batch_is_aborted_on_both_sides(deployment)
        a_new_prefill_server_is_used(deployment)
        check([deployment.ask(body) for body in asked[:6]], wanted[:6])


def check(answers: list[httpx.Response], wanted: list[list[int]]) -> None:
    assert [answer.status_code for answer in answers] == [200] * len(wanted), [answer.text for answer in answers]
    assert [answer.json()["output_ids"] for answer in answers] == wanted


def times_are_told(deployment: Deployment, answers: list[httpx.Response]) -> None:
    for answer in answers:
        told = answer.json()["meta_info"]["handover"]
        assert told["num_bytes"] > 0
        assert 0 <= told["transfer"] <= told["waiting"] <= answer.json()["meta_info"]["e2e_latency"]
    for role in ("prefill", "decode"):
        text = calls.get(f"{deployment.url[role]}/metrics").text
        assert re.search(r"tessera:handover_transfer_seconds_count\{.*\} 24\.0", text), text
        assert re.search(r"tessera:kv_transfer_speed_gb_s\{.*\} [\d.e-]*[1-9]", text), text


def clients_that_leave_hold_nothing(deployment: Deployment) -> None:
    long = {"text": "1 + 1 =", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    for i in range(8):
        with calls.stream("POST", f"{deployment.router}/generate", json=long) as answer:
            if i % 2:
                next(answer.iter_lines())
    deployment.all_free()
    assert deployment.ask({"text": "1 + 1 =", "sampling_params": {"max_new_tokens": 2}}).status_code == 200


def a_batch_is_aborted_on_both_sides(deployment: Deployment) -> None:
    """By the name of the batch, while others go on; then all of them, wherever they are."""
    params = {"max_new_tokens": 2000, "ignore_eos": True}
    bodies = {rid: {"text": ["1 + 1 =", "2 + 2 ="], "sampling_params": params, "rid": rid} for rid in ("b", "bc")}
    with ThreadPoolExecutor(2) as pool:
        asking = {rid: pool.submit(deployment.ask, body) for rid, body in bodies.items()}
        wait_until(lambda: deployment.held("decode") > 0)
        wait_until(lambda: sum(deployment.abort({"rid": "b"}).values()) > 0)
        wait_until(lambda: sum(deployment.abort({"rid": "b"}).values()) == 0)
        ends = [answer["meta_info"]["finish_reason"]["type"] for answer in asking["b"].result().json()]
        assert ends == ["abort", "abort"]
        assert not asking["bc"].done()
        assert sum(deployment.abort({"abort_all": True}).values()) >= 2
        assert asking["bc"].result().status_code == 200
    deployment.all_free()


def a_new_prefill_server_is_used(deployment: Deployment) -> None:
    """It is killed, and another one starts at its addresses; decode goes on as it is."""
    for child in deployment.prefill.children():
        child.kill()
    deployment.prefill.process.kill()
    deployment.prefill.code()
    deployment.prefill = deployment.start_prefill()
    ready(deployment.prefill)
    deployment.up()
