"""What the router costs: CPU time of its process per request and per chunk of a stream. `python bench/router.py`.

Servers that answer at once stand behind it, each a process of its own; CPU time, unlike throughput, hardly depends on
what else the machine does. Prints the rows of `bench/results/router.md`.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tessera.serve.here import Here

CHUNK = b'data: {"text": "twenty or so characters"}\n\n'
PAUSE_S = 0.005  # between chunks, so that each is sent by itself
AT_ONCE = 32
PROMPT = "You are a helpful assistant. " * 40
# roles, chunks of a stream (0: a whole answer), requests
CASES: tuple[tuple[Sequence[str], int, int], ...] = (
    (("worker",), 0, 1600),
    (("prefill", "decode"), 0, 1600),
    (("worker",), 200, 160),
    (("prefill", "decode"), 200, 160),
)


def serve(port: int, chunks: int) -> None:
    """A server that answers at once."""

    async def generate(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            return JSONResponse({"text": "x" * 200})

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(chunks):
                yield CHUNK
                await asyncio.sleep(PAUSE_S)

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def empty(request: Request) -> Response:
        return JSONResponse({})

    routes = [Route("/generate", generate, methods=["POST"]), Route("/health", empty), Route("/server_info", empty)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error", lifespan="off")


async def measure(roles: Sequence[str], chunks: int, requests: int) -> float:
    """Seconds of CPU time of the router for each request."""
    here = Here({})
    ports = [here.port() for _ in roles]
    named = [word for role, port in zip(roles, ports, strict=True) for word in (f"--{role}", f"127.0.0.1:{port}")]
    front = here.port()
    router = [sys.executable, "-m", "tessera.cli", "router", *named, "--port", str(front), "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(_running([sys.executable, __file__, "--serve", str(port), str(chunks)]))
        process = psutil.Process(stack.enter_context(_running(router)).pid)
        async with httpx.AsyncClient(timeout=60, base_url=f"http://127.0.0.1:{front}", trust_env=False) as http:
            await _up(http)
            await _ask(http, chunks, AT_ONCE)
            before = process.cpu_times()
            await _ask(http, chunks, requests)
            after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / requests


async def _ask(http: httpx.AsyncClient, chunks: int, requests: int) -> None:
    left = iter(range(requests))
    body: dict[str, Any] = {"text": PROMPT, "stream": chunks > 0}

    async def one() -> None:
        for _ in left:
            answer = await http.post("/generate", json=body)
            assert answer.status_code == 200, answer.text
            assert not chunks or len(answer.content) == chunks * len(CHUNK)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))


async def _up(http: httpx.AsyncClient) -> None:
    for _ in range(300):
        with contextlib.suppress(httpx.HTTPError):
            if (await http.get("/health")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the router is not ready after 30 s")


@contextlib.contextmanager
def _running(command: list[str]) -> Any:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measures every case."""
    for roles, chunks, requests in CASES:
        seconds = asyncio.run(measure(roles, chunks, requests))
        each = f"{seconds / chunks * 1e6:.0f} us" if chunks else ""
        sys.stdout.write(f"| {' + '.join(roles)} | {chunks or 'whole answer'} | {seconds * 1e3:.2f} ms | {each} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
