"""The router's endpoints: tokens, which are relayed; what any server can answer; what concerns all of them; its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from tessera.core.errors import PeerError, RequestError
from tessera.serve.app import handlers, key_middleware
from tessera.serve.http import Call, Json, UnavailableError, error_body, read_body, read_json
from tessera.serve.metrics import CONTENT_TYPE
from tessera.serve.router.relay import NOT_PASSED, Relayed
from tessera.serve.router.router import Router
from tessera.serve.router.servers import Server
from tessera.serve.trace import Traced

Endpoint = Callable[[Router, Call], Awaitable[Response]]
ANY_SECONDS = 30.0  # for answers that need no tokens


async def tokens(router: Router, call: Call) -> Response:
    """An answer of the model."""
    body = await read_json(call, router.options.max_body_size)
    if not isinstance(body, dict):
        raise RequestError(f"the body is {type(body).__name__}, expected an object", "body")
    if router.stopping:
        raise UnavailableError("the router is shutting down")
    return Relayed(router, call, body)


async def anyone(router: Router, call: Call) -> Response:
    """What every server answers alike: the first that takes requests is asked; those that decode before others."""
    body = await read_body(call, router.options.max_body_size)
    servers = sorted(router.fleet.servers, key=lambda server: server.address.role == "prefill")
    for server in servers:
        if server.circuit.takes:
            return await _pass_on(router, server, call, body)
    raise UnavailableError(router.trouble or "no server takes requests now")


async def everyone(router: Router, call: Call) -> Json:
    """What concerns all servers."""
    body = await read_body(call, router.options.max_body_size)
    told = await asyncio.gather(*(_ask(router, server, call, body) for server in router.fleet.servers))
    return Json({server.url: answer for server, answer in zip(router.fleet.servers, told, strict=True)})


async def _ask(router: Router, server: Server, call: Call, body: bytes) -> Any:
    try:
        answer = await _pass_on(router, server, call, body)
        return json.loads(bytes(answer.body) or b"null")
    except ValueError:
        return bytes(answer.body).decode(errors="replace")
    except PeerError as error:
        return error_body(502, str(error))


async def _pass_on(router: Router, server: Server, call: Call, body: bytes) -> Response:
    url = server.url + call.scope["path"]
    try:
        async with asyncio.timeout(ANY_SECONDS):
            headers = {**router.headers(call), "accept-encoding": "identity"}
            found = await router.http.request(call.method, url, content=body, headers=headers, timeout=ANY_SECONDS)
    except (httpx.HTTPError, TimeoutError) as error:
        raise PeerError(f"{server.url} gave no answer: {type(error).__name__} {error}".strip()) from error
    passed = {name: value for name, value in found.headers.items() if name not in NOT_PASSED}
    return Response(found.content, found.status_code, passed)


async def health(router: Router, call: Call) -> Json:
    """200 while requests can be taken: a server of each role is up."""
    up = {role: sum(s.circuit.takes for s in router.fleet.of(role)) for role in router.fleet.roles}
    if (trouble := router.trouble) is None:
        return Json({"status": "ok", "up": up})
    return Json({**error_body(503, trouble), "up": up}, 503)


async def workers(router: Router, call: Call) -> Json:
    """Every server, and how it does."""
    states = [server.state() for server in router.fleet.servers]
    return Json({"workers": states, "total": len(states)})


async def server_info(router: Router, call: Call) -> Json:
    """What the router was told, and what each server last told of itself."""
    options, fleet = router.options, router.fleet
    return Json(
        {
            "router": {
                "policies": {role: options.policy_of(role) for role in fleet.roles},
                "in_flight": len(router.running),
                "up_s": round(time.time() - router.started, 1),
            },
            "workers": [server.state() for server in fleet.servers],
            **{role: [server.info for server in fleet.of(role)] for role in fleet.roles},
        }
    )


async def metrics(router: Router, call: Call) -> Response:
    """Prometheus' text form."""
    return Response(router.metrics.text(), headers={"content-type": CONTENT_TYPE})


ROUTES: Mapping[str, tuple[Endpoint, Sequence[str]]] = {
    "/v1/completions": (tokens, ["POST"]),
    "/v1/chat/completions": (tokens, ["POST"]),
    "/generate": (tokens, ["POST", "PUT"]),
    "/v1/models": (anyone, ["GET"]),
    "/v1/models/{name:path}": (anyone, ["GET"]),
    "/model_info": (anyone, ["GET"]),
    "/get_model_info": (anyone, ["GET"]),
    "/tokenize": (anyone, ["POST"]),
    "/detokenize": (anyone, ["POST"]),
    "/flush_cache": (everyone, ["GET", "POST"]),
    "/abort_request": (everyone, ["POST"]),
    "/workers": (workers, ["GET"]),
    "/list_workers": (workers, ["GET"]),
    "/server_info": (server_info, ["GET"]),
    "/get_server_info": (server_info, ["GET"]),
    "/health": (health, ["GET"]),
    "/metrics": (metrics, ["GET"]),
}


def make_app(router: Router) -> Starlette:
    """The application over one `Router`."""
    app = Starlette(
        routes=[Route(path, partial(one, router), methods=methods) for path, (one, methods) in ROUTES.items()],
        middleware=[
            *key_middleware(router.options.api_key),
            Middleware(Traced, router.tracing, router.options.log_requests),
        ],
        exception_handlers=handlers(ROUTES),
    )
    app.router.redirect_slashes = False
    return app
