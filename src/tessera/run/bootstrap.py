"""The bootstrap service of a prefill server: HTTP, one port, where decode servers find out who is there."""

from __future__ import annotations

import socket

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tessera.core.errors import ConfigError, Conflict
from tessera.core.messages import Address


class Bootstrap(msgspec.Struct, frozen=True):
    """What `GET /bootstrap` gives, as msgpack. `port`: where connections are taken, at the same host; `names`: of the
    transfer engines of its ranks."""

    port: int
    manifest: bytes
    names: tuple[str, ...]


class Service:
    """Listens from the start, answers once `serve` runs. Raises `ConfigError` when the port is taken."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            flag, remedy = f"--disaggregation-bootstrap-port {port}", "Give a free port, or 0 for any."
            raise ConfigError([Conflict((flag,), f"cannot listen at {host}: {error}", remedy)]) from error
        self.address = Address(host, self._socket.getsockname()[1])
        self._server: uvicorn.Server | None = None

    async def serve(self, bootstrap: Bootstrap) -> None:
        """Answers until `stop`."""
        body = msgspec.msgpack.encode(bootstrap)

        async def record(request: Request) -> Response:
            return Response(body, media_type="application/msgpack")

        async def health(request: Request) -> Response:
            return JSONResponse({"status": "ok"})

        app = Starlette(routes=[Route("/bootstrap", record), Route("/health", health)])
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Ends `serve`, which closes the port."""
        if self._server is not None:
            self._server.should_exit = True
