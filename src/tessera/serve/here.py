"""Processes of a deployment on this host: started, read, signalled, and gone when this process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Protocol
from urllib.parse import urlsplit

from tessera.core.errors import ConfigError, Conflict
from tessera.serve.deployment import Process

TETHER = ("-P", "-m", "tessera.serve.tethered")
CHUNK = 1 << 16


class Child(Protocol):
    """A process that was started, here or elsewhere."""

    where: str  # for people: its process id, or its host

    def lines(self) -> AsyncIterator[str]:
        """What it writes, until it ends."""

    async def wait(self) -> int:
        """Its exit code, once it has ended; negative: minus the signal."""

    async def signal(self, number: int) -> None:
        """Sends a signal; nothing happens when it has ended."""


class Starter(Protocol):
    """Starts processes."""

    async def start(self, process: Process) -> Child:
        """Starts one. Raises TesseraError."""

    async def close(self) -> None:
        """Gives back what it holds."""


class Here(Starter):
    """Starts processes on this host. Call it from a thread that lives as long as they shall (see `die_with`)."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._ports: list[socket.socket] = []

    def port(self) -> int:
        """A port of this host that nobody else is given before `close`, neither to listen at nor to call from.

        It stays bound, for a port that was only free a moment ago may be another process's when a worker comes to it,
        at its start or anew. Who sets SO_REUSEADDR, as our servers do, may listen there all the same.
        """
        return self._hold("127.0.0.1", 0)

    def claim(self, processes: Iterable[Process]) -> None:
        """Keeps the ports that were asked for, too. Raises `ConfigError` for those at which somebody listens already,
        who would be taken for the process that is started, and for those that two of them ask for."""
        given, wrong = {held.getsockname()[1] for held in self._ports}, []
        asked: dict[int, str] = {}
        for name, flag, host, port in _ports(processes):
            what = f"{name}: {flag} {port}"
            if (other := asked.setdefault(port, what)) != what:
                wrong.append(Conflict((other, what), "both would listen there", "Choose another port for one."))
            elif port not in given:
                try:
                    self._hold(host, port)
                except OSError as error:
                    remedy = "Choose another port (0: any free one)."
                    wrong.append(Conflict((what,), f"nobody can listen there: {error.strerror}", remedy))
        if wrong:
            raise ConfigError(wrong)

    def _hold(self, host: str, port: int) -> int:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family)
        self._ports.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        found: int = held.getsockname()[1]
        return found

    async def start(self, process: Process) -> LocalChild:
        """A session of its own keeps Ctrl-C in a terminal from it."""
        command = (sys.executable, *TETHER, str(os.getpid()), *process.command)
        started = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self._environ, "PYTHONUNBUFFERED": "1", **process.environment},
            start_new_session=True,
        )
        return LocalChild(started)

    async def close(self) -> None:
        """Its ports."""
        while self._ports:
            self._ports.pop().close()


def _ports(processes: Iterable[Process]) -> Iterator[tuple[str, str, str, int]]:
    """Ports at which these listen: the process, its flag, the host, the port."""
    for one in processes:
        if one.url:
            url = urlsplit(one.url)
            yield one.name, "--port", url.hostname or "", url.port or 0
            if one.bootstrap:
                yield one.name, "--disaggregation-bootstrap-port", url.hostname or "", one.bootstrap


class LocalChild(Child):
    """A process of this host."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.where = f"process {process.pid}"

    async def lines(self) -> AsyncIterator[str]:
        """Also one without an end; what is no UTF-8 is replaced."""
        out, held = self._process.stdout, b""
        assert out is not None, "it was started with a pipe"
        while chunk := await out.read(CHUNK):
            *whole, held = (held + chunk).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").rstrip("\r")
        if held:
            yield held.decode(errors="replace")

    async def wait(self) -> int:
        return await self._process.wait()

    async def signal(self, number: int) -> None:
        """The kernel keeps the group of a session's leader alive until its last process has ended."""
        if self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
                self._process.send_signal(signal.SIGCONT)  # one that is stopped hears nothing
