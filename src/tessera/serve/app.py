"""The ASGI application: who may call, which endpoint answers, and what becomes of errors."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.authentication import AuthenticationBackend, AuthenticationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import Response
from starlette.routing import Route

from tessera.core.errors import RequestError
from tessera.serve import admin
from tessera.serve.chat_completions import chat_completions
from tessera.serve.completions import completions
from tessera.serve.http import UNAVAILABLE, Call, failure, refusal
from tessera.serve.native import generate
from tessera.serve.server import Server
from tessera.serve.trace import Traced

Endpoint = Callable[[Server, Call], Awaitable[Response]]

ROUTES: Mapping[str, tuple[Endpoint, Sequence[str]]] = {
    "/v1/models": (admin.models, ["GET"]),
    "/v1/models/{name:path}": (admin.model, ["GET"]),
    "/v1/completions": (completions, ["POST"]),
    "/v1/chat/completions": (chat_completions, ["POST"]),
    "/generate": (generate, ["POST", "PUT"]),
    "/tokenize": (admin.tokenize, ["POST"]),
    "/detokenize": (admin.detokenize, ["POST"]),
    "/abort_request": (admin.abort_request, ["POST"]),
    "/flush_cache": (admin.flush_cache, ["GET", "POST"]),
    "/start_profile": (admin.start_profile, ["GET", "POST"]),
    "/stop_profile": (admin.stop_profile, ["GET", "POST"]),
    "/model_info": (admin.model_info, ["GET"]),
    "/get_model_info": (admin.model_info, ["GET"]),
    "/server_info": (admin.server_info, ["GET"]),
    "/get_server_info": (admin.server_info, ["GET"]),
    "/health": (admin.health, ["GET"]),
    "/health_generate": (admin.health_generate, ["GET"]),
    "/metrics": (admin.metrics, ["GET"]),
}
OPEN = frozenset({"/health"})  # answered without an API key


def make_app(server: Server) -> Starlette:
    """The application over one `Server`."""
    options = server.options
    app = Starlette(
        routes=[Route(path, partial(one, server), methods=methods) for path, (one, methods) in ROUTES.items()],
        middleware=[
            *key_middleware(options.api_key),
            Middleware(Traced, options.tracing, options.log_requests),
        ],
        exception_handlers=handlers(ROUTES),
    )
    app.router.redirect_slashes = False
    return app


def key_middleware(key: str | None) -> list[Middleware]:
    """What asks for the API key, if there is one."""
    return [] if key is None else [Middleware(AuthenticationMiddleware, Key(key), _no_key)]


def handlers(paths: Iterable[str]) -> dict[Any, Callable[[Any, Any], Awaitable[Response]]]:
    """What becomes of errors. `paths`: what is served."""
    shown = sorted(path.replace(":path}", "}") for path in paths)
    return {
        **dict.fromkeys((RequestError, *UNAVAILABLE, Exception), _failed),
        404: partial(_not_found, shown),
        405: _not_allowed,
        ClientDisconnect: _left,
    }


class Key(AuthenticationBackend):
    """Lets those in who know the key."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def authenticate(self, conn: HTTPConnection) -> None:
        """Raises AuthenticationError."""
        scheme, _, found = conn.headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(found.strip().encode(), self._key)
        if not right and conn.scope["path"] not in OPEN:
            raise AuthenticationError("the API key is missing or wrong; send 'Authorization: Bearer KEY'")


def _no_key(conn: HTTPConnection, error: Exception) -> Response:
    return refusal(401, str(error))


async def _failed(call: Call, error: Exception) -> Response:
    return failure(error)


async def _not_found(paths: Sequence[str], call: Call, error: Exception) -> Response:
    return refusal(404, f"{call.scope['path'][:100]} is not served; there are: {', '.join(paths)}")


async def _not_allowed(call: Call, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allow = (error.headers or {})["Allow"]
    answer = refusal(405, f"{call.method} {call.scope['path'][:100]} is not served; allowed: {allow}")
    answer.headers["allow"] = allow
    return answer


async def _left(call: Call, error: Exception) -> Response:
    return Response(status_code=499)  # that nobody will see
