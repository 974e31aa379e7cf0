"""The HTTP listener: uvicorn on a socket of ours, inside our event loop, with our own answer to signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tessera.core.errors import ConfigError, Conflict
from tessera.serve.trace import POLLS

BACKLOG = 2048
KEEP_ALIVE = 30  # seconds that an idle connection stays open
CLOSE_SECONDS = 3  # for answers under way when it closes


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reason = f"cannot listen there: {error.strerror or error}"
        remedy = "Choose another --port (0: any free one), or another --host."
        raise ConfigError([Conflict((f"--host {host}", f"--port {port}"), reason, remedy)]) from error


class Connection(HttpToolsProtocol):
    """Closes after `KEEP_ALIVE` in which no whole head of a request came; uvicorn's own timer knows only later ones."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()

    def _wait(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)


def _told(record: logging.LogRecord) -> bool:
    """False for a line of the access log about a poll that was answered; one that was not is news."""
    assert isinstance(record.args, tuple)
    _, method, path, _, status = record.args
    return not (method == "GET" and str(path).partition("?")[0] in POLLS and status == 200)


class Listener(uvicorn.Server):
    """uvicorn serving `app` on one socket, as a task. `access_log`: a line for each request, but for polls."""

    def __init__(self, app: Any, listening: socket.socket, access_log: bool) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=access_log,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.access").addFilter(_told)
        self.listening = listening
        self.task: asyncio.Task[None] = asyncio.create_task(self.serve([listening]))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the front's."""
        yield

    async def close(self) -> None:
        """Lets answers under way go out, for `CLOSE_SECONDS`, and ends."""
        self.should_exit = True
        done, _ = await asyncio.wait([self.task], timeout=2 * CLOSE_SECONDS)
        if not done:
            self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def url(listening: socket.socket) -> str:
    """Where clients on this machine reach it."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
