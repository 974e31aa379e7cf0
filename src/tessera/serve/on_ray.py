"""`tessera up --on ray`: the processes of a deployment as actors of a Ray cluster, each on the host it was planned for.

Ray only finds hosts and keeps processes there; they speak with each other as they do without it. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from itertools import count
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tessera.core.errors import CapacityError, PeerError
from tessera.serve.deployment import Process, Site, numbered
from tessera.serve.here import TETHER, Child, Starter
from tessera.serve.recipe import Recipe

FIRST_PORT = 31000
START_SECONDS = 120.0  # for Ray to find room for an actor
ASK_SECONDS = 60.0
READ_SECONDS = 5.0  # that an actor waits for a line, so that calls end
MOST_LINES = 10_000  # held for whoever reads


class Keeper:
    """An actor that keeps one process of its host. A thread starts it that lives as long (see `die_with`)."""

    def __init__(self, command: list[str], environment: dict[str, str], environ: dict[str, str]) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._news, self._over = threading.Condition(), False
        self._started = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._error: OSError | None = None
        arguments = ([sys.executable, *TETHER, str(os.getpid()), *command], {**environ, **environment})
        threading.Thread(target=self._keep, args=arguments, daemon=True).start()
        self._started.wait()

    def _keep(self, command: list[str], environment: dict[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tell(line.rstrip("\n"))
        self._process.wait()
        self._tell(None)

    def _tell(self, line: str | None) -> None:
        with self._news:
            if line is None:
                self._over = True
            else:
                self._lines.append(line)
            self._news.notify_all()

    def pid(self) -> int:
        """Its process id. Raises OSError where it could not be started."""
        if self._error is not None:
            raise self._error
        assert self._process is not None
        return self._process.pid

    def read(self) -> tuple[list[str], int | None]:
        """New lines, waited for; and the exit code once it has ended and all is read."""
        with self._news:
            self._news.wait_for(lambda: self._lines or self._over, READ_SECONDS)
            found = list(self._lines)
            self._lines.clear()
            over = self._over
        assert self._process is not None
        return found, self._process.returncode if over else None

    def signal(self, number: int) -> None:
        """Sends a signal; a kill takes the whole session."""
        if self._process is None or self._process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)  # one that is stopped hears nothing


class Cluster(Starter):
    """Starts processes on the hosts of a Ray cluster, numbered from the one that runs this command."""

    def __init__(self, hosts: list[dict[str, Any]], environ: Mapping[str, str]) -> None:
        self._hosts, self._environ = hosts, dict(environ)
        self._actor = ray.remote(Keeper)
        self._ports = count(FIRST_PORT)

    def site(self, recipe: Recipe) -> Site:
        """Where a recipe's processes go. GPUs are those of the recipe's hosts, as far as the cluster has any."""
        gpus = min((int(host["Resources"].get("GPU", 0)) for host in self._hosts), default=0)
        return Site(
            host=self._address,
            port=lambda: next(self._ports),
            gpus=numbered(min(gpus, recipe.gpus_per_node)),
            listen="0.0.0.0",
            packed=len(self._hosts) == 1,
        )

    def _address(self, node: int) -> str:
        if node >= len(self._hosts):
            raise CapacityError(f"the recipe needs {node + 1} hosts or more, the Ray cluster has {len(self._hosts)}")
        return str(self._hosts[node]["NodeManagerAddress"])

    async def start(self, process: Process) -> RayChild:
        """On the host that it was planned for, and on no other."""
        host = self._hosts[process.node]
        actor = self._actor.options(
            num_cpus=0,
            num_gpus=process.gpus,
            max_concurrency=4,  # a read waits while a signal comes
            scheduling_strategy=NodeAffinitySchedulingStrategy(host["NodeID"], soft=False),
        ).remote(list(process.command), dict(process.environment), self._environ)
        pid = await _answer(actor.pid.remote(), START_SECONDS, f"{process.name} could not be started")
        return RayChild(actor, f"{host['NodeManagerAddress']}, process {pid}")

    async def close(self) -> None:
        """Leaves the cluster."""
        await asyncio.to_thread(ray.shutdown)


class RayChild(Child):
    """A process that an actor keeps."""

    def __init__(self, actor: Any, where: str) -> None:
        self._actor = actor
        self._code: int | None = None
        self.where = where

    async def lines(self) -> AsyncIterator[str]:
        """An actor that is lost has lost its process, too: the kernel saw to that."""
        while self._code is None:
            try:
                found, self._code = await _answer(self._actor.read.remote(), ASK_SECONDS, "a process was lost")
            except PeerError as error:
                found, self._code = [str(error)], -int(signal.SIGKILL)
            for line in found:
                yield line

    async def wait(self) -> int:
        assert self._code is not None, "all lines are read first"
        return self._code

    async def signal(self, number: int) -> None:
        if self._code is None:
            try:
                await _answer(self._actor.signal.remote(number), ASK_SECONDS, "a process was lost")
            except PeerError as error:
                logging.getLogger(__name__).warning("%s", error)


async def _answer(reference: Any, seconds: float, what: str) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await reference
    except TimeoutError:
        raise PeerError(f"{what}: Ray did not answer within {seconds:g} s") from None
    except (ray.exceptions.RayError, OSError) as error:
        raise PeerError(f"{what}: {error}") from error


def connect(environ: Mapping[str, str]) -> Cluster:
    """The running cluster that RAY_ADDRESS names, or the one of this host, or a new one of this host alone."""
    ray.init(address=environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.WARNING)
    mine = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    return Cluster(sorted(alive, key=lambda node: (node["NodeID"] != mine, node["NodeID"])), environ)
