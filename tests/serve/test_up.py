"""`tessera up` with fake workers and the real router: states, answers, Ctrl-C, a worker that ends, one that is deaf."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve.support import in_loop
from tessera.core.errors import ConfigError, DeadlineError, PeerError
from tessera.serve.deployment import Site, deploy
from tessera.serve.here import Here
from tessera.serve.listener import bind
from tessera.serve.recipe import changed, load_recipe
from tessera.serve.up import Running, Supervisor
from waits import PATIENCE_S, until, wait_until

RECIPES = Path(__file__).parents[2] / "recipes"
FAKE = (sys.executable, str(Path(__file__).parent / "router" / "fake_cli.py"))
QUICK = ["router.drain-timeout=1"]


class Signals:
    """Signals by hand."""

    def __init__(self) -> None:
        self.first = asyncio.Event()


class Seen:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.changes: list[str] = []
        self.running: dict[str, Running] = {}

    def line(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def change(self, what: str, running: Iterable[Running]) -> None:
        self.changes.append(what)
        self.running = {one.process.name: one for one in running}

    def told(self, text: str) -> bool:
        return any(text in change for change in self.changes)

    def pid(self, name: str) -> int:
        return int(self.running[name].child.where.split()[-1])


class Up:
    """A deployment that runs."""

    def __init__(self, changes: list[str], view: Seen | None = None, **options: Any) -> None:
        recipe = changed(load_recipe(RECIPES / "abacus-cpu.yaml"), [*QUICK, *changes])
        here = Here(dict(os.environ))
        site = Site(lambda node: "127.0.0.1", here.port, (), python=FAKE)
        self.signals, self.view = Signals(), view or Seen()
        self.deployment = deploy(recipe, site, {"port": 0})
        self.supervisor = Supervisor(self.deployment, here, self.view, **{"drain": 5.0, **options})
        self.task = asyncio.create_task(self.supervisor.run(self.signals))  # type: ignore[arg-type]

    async def ready(self) -> None:
        await until(lambda: self.view.told("processes are ready") or self.task.done())
        assert not self.task.done(), self.task.exception()

    async def stop(self) -> None:
        self.signals.first.set()
        await asyncio.wait_for(self.task, PATIENCE_S)


@asynccontextmanager
async def up(changes: list[str], **options: Any) -> AsyncIterator[Up]:
    made = Up(changes, **options)
    try:
        yield made
    finally:
        made.signals.first.set()
        await asyncio.gather(made.task, return_exceptions=True)
        pids = [made.view.pid(name) for name in made.view.running]
        assert not any(psutil.pid_exists(pid) for pid in pids), "nothing is left"


@in_loop
async def test_a_pair_comes_up_answers_and_goes_in_order() -> None:
    async with up([]) as made:
        await made.ready()
        async with httpx.AsyncClient(base_url=made.deployment.router.url, timeout=PATIENCE_S, trust_env=False) as http:
            answer = (await http.post("/generate", json={"text": "hi"})).json()
            workers = (await http.get("/workers")).json()["workers"]
        assert answer["role"] == "decode"
        bootstrap = made.deployment.workers[0].command
        assert workers[0]["bootstrap_port"] == int(bootstrap[bootstrap.index("--disaggregation-bootstrap-port") + 1])
        assert {name for name, _ in made.view.lines} == {"prefill-0", "decode-0", "router"}
        assert any("--enable-dp-attention" in text for name, text in made.view.lines if name == "decode-0")
        await made.stop()
        ends = [change.split()[0] for change in made.view.changes if "ended" in change]
        assert ends[0] == "router", "it goes first, so that what runs can finish"
        assert sorted(ends) == ["decode-0", "prefill-0", "router"]


@in_loop
async def test_everything_ends_when_one_does() -> None:
    async with up(["decode.env.DIE_AFTER=1"]) as made:
        with pytest.raises(PeerError, match="decode-0 ended with exit code 3, so everything ends"):
            await asyncio.wait_for(made.task, PATIENCE_S)


@in_loop
async def test_one_that_ends_is_started_again_at_its_address_where_that_was_asked() -> None:
    async with up([], on_failure="restart") as made:
        await made.ready()
        old = made.view.pid("prefill-0")
        os.kill(old, signal.SIGKILL)
        await until(lambda: made.view.told("prefill-0 was ended by SIGKILL"))
        await until(lambda: made.view.pid("prefill-0") != old and made.view.running["prefill-0"].state == "ready")
        async with httpx.AsyncClient(base_url=made.deployment.router.url, timeout=PATIENCE_S, trust_env=False) as http:
            limit = time.monotonic() + PATIENCE_S
            while (await http.post("/generate", json={"text": "hi"})).status_code != 200:
                assert time.monotonic() < limit
                await asyncio.sleep(0.2)
        assert not made.task.done()


@in_loop
async def test_restarts_are_bounded() -> None:
    async with up(["decode.env.DIE_AFTER=0.1"], on_failure="restart", restarts=1) as made:
        with pytest.raises(PeerError, match=r"1 restarts in 600 s are all"):
            await asyncio.wait_for(made.task, PATIENCE_S)


@in_loop
async def test_the_others_are_kept_where_that_was_asked() -> None:
    async with up([], on_failure="continue") as made:
        await made.ready()
        os.kill(made.view.pid("prefill-0"), signal.SIGKILL)
        await until(lambda: made.view.told("prefill-0 was ended"))
        await asyncio.sleep(0.5)
        assert not made.task.done()
        assert made.view.running["decode-0"].state == "ready"


@in_loop
async def test_one_that_never_gets_ready_is_named() -> None:
    async with up(["prefill.env.SICK=1"], patience=6.0) as made:
        with pytest.raises(DeadlineError, match=r"not ready within 6 s.*prefill-0"):
            await asyncio.wait_for(made.task, PATIENCE_S)


@in_loop
async def test_one_that_does_not_get_ready_when_it_is_started_anew_counts_as_ended(tmp_path: Path) -> None:
    """Known fault: only the first start had a deadline."""
    async with up([f"decode.env.ONCE={tmp_path / 'once'}"], on_failure="restart", restarts=2) as made:
        await made.ready()
        made.supervisor._patience = 1.0
        os.kill(made.view.pid("decode-0"), signal.SIGKILL)
        told = r"decode-0 was not ready within 1 s \(--start-timeout\) and was killed; 2 restarts in 600 s are all"
        with pytest.raises(PeerError, match=told):
            await asyncio.wait_for(made.task, PATIENCE_S)


@in_loop
async def test_one_that_does_not_listen_is_killed() -> None:
    async with up(["decode.env.DEAF=1"], drain=1.0) as made:
        await made.ready()
        await made.stop()
        assert made.view.told("killed after 1 s: decode-0")
        assert made.view.told("decode-0 was ended by SIGKILL")


@pytest.mark.parametrize("name", ["decode-0", "router"])
@in_loop
async def test_one_that_hangs_is_killed_and_told(name: str) -> None:
    """Known faults: what was stopped, and not killed, was never missed; its end was said to be for want of memory."""
    async with up([], silence=1.5) as made:
        await made.ready()
        os.kill(made.view.pid(name), signal.SIGSTOP)
        told = rf"{name} did not answer for \d+.\d s and was killed, so everything ends"
        with pytest.raises(PeerError, match=told):
            await asyncio.wait_for(made.task, PATIENCE_S)
        assert made.view.told(f"{name} did not answer for")
        assert not made.view.told(f"{name} was ended by SIGKILL")


@in_loop
async def test_one_that_is_slow_is_not_killed() -> None:
    """Only silence counts: neither a status nor a probe that is missed once in a while."""
    async with up(["decode.env.SLOW=0.4"], silence=1.5) as made:
        await made.ready()
        await asyncio.sleep(6.0)
        assert not made.task.done()


@in_loop
async def test_one_that_is_stopped_ends_in_order_with_the_others() -> None:
    """It has nothing to hear a signal with until it goes on."""
    async with up([], drain=PATIENCE_S) as made:
        await made.ready()
        os.kill(made.view.pid("decode-0"), signal.SIGSTOP)
        await made.stop()
        assert not made.view.told("killed")


@in_loop
async def test_a_view_that_fails_ends_everything_in_order() -> None:
    class Blind(Seen):
        def line(self, name: str, text: str) -> None:
            raise BrokenPipeError("nobody reads")

    async with up([], view=Blind()) as made:
        with pytest.raises(BrokenPipeError):
            await asyncio.wait_for(made.task, PATIENCE_S)


def test_a_port_that_was_given_out_is_nobody_elses_until_the_end() -> None:
    """Known fault: it was only free a moment ago, and another process's when the worker came to it."""
    here, before = Here({}), psutil.Process().num_fds()
    port = here.port()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", port))
    for host in ("127.0.0.1", "0.0.0.0"):
        bind(host, port).close()  # as the worker does, and who follows it
    asyncio.run(here.close())
    assert psutil.Process().num_fds() == before


def test_a_port_that_was_asked_for_and_is_taken_is_refused_before_anything_starts() -> None:
    """Known fault: whoever listened there answered the probes, and the router was told to be ready."""
    here = Here({})
    deployment = deploy(load_recipe(RECIPES / "abacus-cpu.yaml"), Site(lambda node: "127.0.0.1", here.port, ()), {})
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        router = dataclasses.replace(deployment.router, url=f"http://127.0.0.1:{taken}")
        with pytest.raises(
            ConfigError, match=rf"router: --port {taken}: nobody can listen there: Address already in use"
        ):
            here.claim([*deployment.workers, router])
    here.claim([*deployment.workers, router])  # it is free now, and kept
    with socket.socket() as late, pytest.raises(OSError, match="Address already in use"):
        late.bind(("127.0.0.1", taken))
    bind("127.0.0.1", taken).close()
    asyncio.run(here.close())


@pytest.mark.parametrize("flag", ["port", "disaggregation-bootstrap-port"])
def test_every_port_that_a_recipe_names_is_looked_at(flag: str) -> None:
    """Known fault: not the one at which decode servers meet prefill; its worker failed minutes later."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"prefill-0: --{flag} {taken}: nobody can listen there"):
            claimed([f"prefill.{flag}={taken}"])
    with pytest.raises(ConfigError, match=rf"prefill-0: --{flag} {taken} with router: --port {taken}: both would"):
        claimed([f"prefill.{flag}={taken}", f"router.port={taken}"])
    claimed([f"prefill.{flag}={taken}"])
    claimed([f"prefill.{flag}=0", "prefill.workers=2"])  # 0: any free one, for each


def claimed(changes: list[str]) -> None:
    """The ports of a deployment so changed can be had."""
    here = Here({})
    recipe = changed(load_recipe(RECIPES / "abacus-cpu.yaml"), ["router.port=0", *changes])
    found = deploy(recipe, Site(lambda node: "127.0.0.1", here.port, ()), {})
    try:
        here.claim([*found.workers, found.router])
    finally:
        asyncio.run(here.close())
    prefill = [one for one in found.workers if one.role == "prefill"]
    assert all(one.bootstrap > 0 for one in prefill)
    assert len({one.url for one in prefill} | {one.bootstrap for one in prefill}) == 2 * len(prefill)


def test_workers_end_with_whoever_started_them(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        "import asyncio, os, sys\n"
        "from tessera.serve.here import Here\n"
        "from tessera.serve.deployment import Process\n"
        "async def main():\n"
        "    child = await Here(dict(os.environ)).start(Process('a', 'worker', ('sleep', '60'), {}))\n"
        "    print(child.where.split()[-1], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    owner = psutil.Popen([sys.executable, str(script)], stdout=-1, text=True)
    pid = int(owner.stdout.readline())
    wait_until(lambda: psutil.Process(pid).cmdline()[:1] == ["sleep"])
    owner.kill()
    owner.wait(PATIENCE_S)
    owner.stdout.close()
    wait_until(lambda: not psutil.pid_exists(pid))
