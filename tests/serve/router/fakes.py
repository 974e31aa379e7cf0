"""Servers that the router is tried against: real sockets on loopback, SGLang's contract, and every way to misbehave.

A prefill server answers once the decode server has come to the same room; the decode server once prefill has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ports import free_port
from tessera.serve.listener import Listener, bind, url
from tessera.serve.router.app import make_app
from tessera.serve.router.router import Options, Router
from tessera.serve.router.servers import Address, Role
from tessera.serve.trace import Tracing
from waits import PATIENCE_S, until

PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")


class Rooms:
    """Where a fake prefill and a fake decode server meet."""

    def __init__(self) -> None:
        self._events: dict[tuple[str, int], asyncio.Event] = {}

    def event(self, what: str, room: int) -> asyncio.Event:
        return self._events.setdefault((what, room), asyncio.Event())


class Fake:
    """One server. Set `status`, `health`, `hang`, `break_after`, `gap` to misbehave; `seen`: the calls for tokens."""

    def __init__(self, role: Role, rooms: Rooms, dp: int = 1, listening: socket.socket | None = None) -> None:
        self.role, self.rooms, self.dp = role, rooms, dp
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.peers: list[tuple[str, int]] = []  # connections that they came by
        self.aborted: list[str] = []
        self.left: list[tuple[str, float]] = []  # rid, when its client left
        self.others: list[tuple[str, str]] = []
        self.status, self.health, self.mode = 200, 200, None
        self.hang = False  # never answer what comes from now on
        self.die = False  # go away at the next request
        self.break_after: int | None = None  # chunks, then the connection breaks
        self.gap = 0.0  # seconds between chunks
        self.health_lag, self._probes = 0.0, 0  # seconds of every other probe
        self.lag = 0.0  # seconds until it answers, once the other has come
        self.go_on = asyncio.Event()  # and not while this is clear
        self.go_on.set()
        self.refusal = {"error": {"message": "no", "type": "x", "param": None, "code": None}}
        self.chunks = [
            b'data: {"text": "a"}\n\n',
            b': a comment\n\ndata: {"te',
            b'xt": "\xc3\xa4"}\n\n',
            b"data: [DONE]\n\n",
        ]
        routes = [Route(path, self._tokens, methods=["POST"]) for path in PATHS]
        routes += [
            Route("/health", self._health),
            Route("/server_info", self._info),
            Route("/abort_request", self._abort, methods=["POST"]),
            Route("/v1/models", self._other),
            Route("/flush_cache", self._other, methods=["GET", "POST"]),
        ]
        self.app = Starlette(routes=routes)
        self.listening = listening or bind("127.0.0.1", free_port())  # which it comes back to
        self.url = url(self.listening)
        self.listener: Listener | None = None
        self.start()

    def start(self) -> None:
        if self.listening.fileno() < 0:
            self.listening = bind("127.0.0.1", int(self.url.rpartition(":")[2]))
        self.listener = Listener(self.app, self.listening, access_log=False)

    async def stop(self) -> None:
        """Away, as if killed: open connections break."""
        assert self.listener is not None
        self.listener.force_exit = True
        await self.listener.close()
        self.listening.close()

    @property
    def address(self) -> Address:
        return Address(self.url, self.role, 8998 if self.role == "prefill" else None)

    def room_of(self, body: dict[str, Any]) -> list[int]:
        rooms = body.get("bootstrap_room", [])
        return rooms if isinstance(rooms, list) else [rooms]

    async def _health(self, request: Request) -> Response:
        self._probes += 1
        await asyncio.sleep(self.health_lag * (self._probes % 2))
        return JSONResponse({}, self.health)

    async def _info(self, request: Request) -> Response:
        return JSONResponse({"dp_size": self.dp, **({"disaggregation_mode": self.mode} if self.mode else {})})

    async def _abort(self, request: Request) -> Response:
        self.aborted.append((await request.json())["rid"])
        return JSONResponse({"aborted": 1})

    async def _other(self, request: Request) -> Response:
        self.others.append((request.method, request.url.path))
        return JSONResponse({"from": self.url})

    async def _tokens(self, request: Request) -> Response:
        body = await request.json()
        self.peers.append((request.client.host, request.client.port) if request.client else ("", 0))
        self.seen.append((request.url.path, body, dict(request.headers)))
        if self.die:
            assert self.listener is not None
            self.listening.close()
            for connection in list(self.listener.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            return Response()
        work = asyncio.create_task(self._meet(body, self.hang))  # as it is now: the task begins later
        gone = asyncio.create_task(self._gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.left.append((body["rid"], time.monotonic()))
                return Response(status_code=499)
        finally:
            for task in (work, gone):
                task.cancel()
        if self.status != 200:
            return JSONResponse(self.refusal, self.status)
        if body.get("stream"):
            return StreamingResponse(self._stream(body), media_type="text/event-stream", headers={"x-fake": self.role})
        if self.break_after is not None:
            raise ConnectionError("broken on purpose")
        return JSONResponse({"role": self.role, "rooms": self.room_of(body)}, headers={"x-fake": self.role})

    async def _meet(self, body: dict[str, Any], hang: bool) -> None:
        if hang:
            await asyncio.Event().wait()
        mine, other = ("prefill", "decode") if self.role == "prefill" else ("decode", "prefill")
        if self.status != 200:
            for room in self.room_of(body):  # the other leg is under way: it has something to be cancelled
                await self.rooms.event(other, room).wait()
            return
        for room in self.room_of(body):
            self.rooms.event(mine, room).set()
            await self.rooms.event(other, room).wait()
        await asyncio.sleep(self.lag)
        await self.go_on.wait()

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        try:
            for i, chunk in enumerate(self.chunks):
                if i == self.break_after:
                    raise ConnectionError("broken on purpose")
                yield chunk
                await asyncio.sleep(self.gap)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append((body["rid"], time.monotonic()))
            raise

    async def _gone(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass


class World:
    """A router before fake servers, all in one event loop, over sockets."""

    def __init__(self, router: Router, fakes: list[Fake], http: httpx.AsyncClient) -> None:
        self.router, self.fakes, self.http = router, fakes, http

    def of(self, role: Role) -> list[Fake]:
        return [fake for fake in self.fakes if fake.role == role]

    async def up(self) -> None:
        await until(lambda: self.router.trouble is None)

    def idle(self) -> bool:
        """Nothing is left of any request in the router's books."""
        servers = self.router.fleet.servers
        return not self.router.running and all(s.in_flight == 0 and sum(s.ranks) == 0 for s in servers)


@contextlib.asynccontextmanager
async def world(
    prefill: int = 0, decode: int = 0, worker: int = 0, dp: int = 1, tracing: Tracing | None = None, **options: Any
) -> AsyncIterator[World]:
    """A router with so many servers of each role, once it takes requests. A silent one is not given up before the
    patience of a test ends, unless `silence` says so."""
    rooms = Rooms()
    roles: list[Role] = ["prefill"] * prefill + ["decode"] * decode + ["worker"] * worker
    fakes = [Fake(role, rooms, dp if role == "prefill" else 1) for role in roles]
    given = {"policy": "round_robin", "interval": 0.05, "silence": 300.0, **options}
    router = Router(Options(tuple(fake.address for fake in fakes), **given), tracing)
    listening = bind("127.0.0.1", 0)
    listener = Listener(make_app(router), listening, access_log=False)
    watching = asyncio.create_task(router.watch())
    try:
        async with httpx.AsyncClient(base_url=url(listening), timeout=PATIENCE_S, trust_env=False) as http:
            made = World(router, fakes, http)
            await made.up()
            yield made
            await until(made.idle)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await listener.close()
        await router.close()
        listening.close()
        await asyncio.gather(*(fake.stop() for fake in fakes))


def text(body: bytes) -> Any:
    """JSON."""
    return json.loads(body)
