"""The ASGI application: who may call, which endpoint answers, and what becomes of errors."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping

from tessera.core.errors import RequestError
from tessera.serve import admin
from tessera.serve.chat_completions import chat_completions
from tessera.serve.completions import completions
from tessera.serve.http import Call, Disconnected, MethodError, Receive, Scope, Send
from tessera.serve.native import generate
from tessera.serve.server import Server

log = logging.getLogger(__name__)
Endpoint = Callable[[Server, Call], Awaitable[None]]

ROUTES: Mapping[str, Mapping[str, Endpoint]] = {
    "/v1/models": {"GET": admin.models},
    "/v1/completions": {"POST": completions},
    "/v1/chat/completions": {"POST": chat_completions},
    "/generate": {"POST": generate, "PUT": generate},
    "/tokenize": {"POST": admin.tokenize},
    "/detokenize": {"POST": admin.detokenize},
    "/abort_request": {"POST": admin.abort_request},
    "/flush_cache": {"GET": admin.flush_cache, "POST": admin.flush_cache},
    "/model_info": {"GET": admin.model_info},
    "/get_model_info": {"GET": admin.model_info},
    "/server_info": {"GET": admin.server_info},
    "/get_server_info": {"GET": admin.server_info},
    "/health": {"GET": admin.health},
    "/health_generate": {"GET": admin.health_generate},
    "/metrics": {"GET": admin.metrics},
}
MODEL_PREFIX = "/v1/models/"
OPEN = frozenset({"/health"})  # answered without an API key


class App:
    """ASGI callable over one `Server`."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        call = Call(scope, receive, send)
        try:
            self._authorise(call)
            await find(call)(self.server, call)
        except Disconnected:
            log.debug("%s %s: the client left", call.method, call.path)
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("%s %s failed", call.method, call.path)
            await call.fail(error)

    def _authorise(self, call: Call) -> None:
        key = self.server.options.api_key
        if key is None or call.path in OPEN:
            return
        scheme, _, found = call.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(found.strip().encode(), key.encode()):
            raise RequestError("the API key is missing or wrong; send 'Authorization: Bearer KEY'", None, 401)


def find(call: Call) -> Endpoint:
    """The endpoint of a call, or a 404 or 405."""
    by_method = ROUTES.get(call.path)
    if by_method is None and call.path.startswith(MODEL_PREFIX):
        by_method = {"GET": admin.model}
    if by_method is None:
        message = f"{call.path[:100]} is not served; there are: {', '.join(sorted(ROUTES))}"
        raise RequestError(message, None, 404)
    endpoint = by_method.get("GET" if call.method == "HEAD" else call.method)
    if endpoint is None:
        raise MethodError(call, by_method)
    return endpoint
