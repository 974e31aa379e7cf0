"""Processes kept by Ray actors. Runs where the extra `ray` is installed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest

from serve.support import in_loop
from tessera.core.errors import CapacityError, PeerError
from tessera.serve.deployment import Process
from tessera.serve.recipe import read_recipe
from waits import until

ray = pytest.importorskip("ray")
from tessera.serve import on_ray  # noqa: E402

PLAIN = "tessera_config: {aggregated: {model-path: x}}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def here() -> on_ray.Cluster:
    return on_ray.Cluster([node for node in ray.nodes() if node["Alive"]], dict(os.environ))


@in_loop
async def test_lines_and_ends(cluster: None) -> None:
    script = "import os, time; print(os.environ['WHO'], os.getpid(), flush=True); time.sleep(60)"
    child = await here().start(Process("a", "worker", (sys.executable, "-c", script), {"WHO": "me"}))
    got: list[str] = []

    async def read() -> None:
        async for line in child.lines():
            got.append(line)  # noqa: PERF401

    reader = asyncio.create_task(read())
    await until(lambda: bool(got))
    who, pid = got[0].split()
    assert (who, child.where.split()[-1]) == ("me", pid)
    await child.signal(signal.SIGTERM)
    await asyncio.wait_for(reader, 20)
    assert await child.wait() == -signal.SIGTERM
    assert not psutil.pid_exists(int(pid))


@in_loop
async def test_a_lost_actor_is_a_lost_process(cluster: None) -> None:
    child = await here().start(Process("a", "worker", ("sleep", "60"), {}))
    pid = int(child.where.split()[-1])
    ray.kill(child._actor)
    got = [line async for line in child.lines()]
    assert "a process was lost" in got[-1]
    assert await child.wait() == -signal.SIGKILL
    await until(lambda: not psutil.pid_exists(pid))


@in_loop
async def test_what_cannot_be(cluster: None) -> None:
    with pytest.raises(CapacityError, match="needs 3 hosts or more"):
        here().site(read_recipe(PLAIN)).host(2)
    child = await here().start(Process("a", "worker", ("/no/such/program",), {}))
    got = [line async for line in child.lines()]
    assert "No such file" in got[-1]
    assert issubclass(PeerError, ConnectionError)
