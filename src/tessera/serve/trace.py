"""One trace id through router, prefill and decode: W3C trace context in, and out to whoever is asked next.

The header `traceparent` (https://www.w3.org/TR/trace-context/) is always honoured and passed on, so that logs of all
servers name one id. Spans are recorded only with `--enable-trace`, by OpenTelemetry (`trace_otel.py`, an extra).
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from importlib import import_module

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera.core.errors import ConfigError, Conflict

log = logging.getLogger(__name__)
PARENT, STATE = "traceparent", "tracestate"
FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
POLLS = frozenset({"/health", "/health_generate", "/metrics"})  # asked all the time: neither traced nor logged


class Span:
    """A piece of work in a trace; this one is recorded by nobody. `flags`, `state`: handed on as they came."""

    def __init__(self, trace_id: str, flags: str, state: str | None) -> None:
        self.trace_id = trace_id  # 32 hex digits
        self._flags, self._state = flags, state
        self._id = _id(8)

    @property
    def headers(self) -> dict[str, str]:
        """What a server gets that is asked on its behalf: `traceparent`, and `tracestate` where there is one."""
        parent = {PARENT: f"00-{self.trace_id}-{self._id}-{self._flags}"}
        return parent if self._state is None else {**parent, STATE: self._state}

    def child(self, name: str) -> Span:
        """A piece of this work, done by somebody else."""
        return Span(self.trace_id, self._flags, self._state)

    def phase(self, name: str, begin: float, end: float, attributes: Mapping[str, float]) -> None:
        """A part of this work that is over. `begin`, `end`: of `time.monotonic`."""

    def end(self, status: int | None = None) -> None:
        """It is over. `status`: that of HTTP; None: it was given up."""


class Tracing:
    """Begins traces. This one hands trace contexts on, and makes one where a request brings none."""

    def begin(self, name: str, headers: Mapping[str, str]) -> Span:
        """Work that a request with these headers asked for."""
        found = FORM.fullmatch(headers.get(PARENT, ""))
        # Version ff and zeros are invalid; a version above 00 may carry more, which is not passed on (section 4.2).
        if found is None or found[1] == "ff" or not int(found[2], 16) or not int(found[3], 16):
            return Span(_id(16), "00", None)
        return Span(found[2], found[4], headers.get(STATE))

    def close(self) -> None:
        """Sends what is recorded."""


def make_tracing(enabled: bool, endpoint: str, service: str) -> Tracing:
    """Tracing as asked. `endpoint`: a collector's HOST:PORT (gRPC), or its address (HTTP). Raises ConfigError."""
    if not enabled:
        return Tracing()
    try:
        recorded = import_module("tessera.serve.trace_otel")  # an extra
    except ImportError as error:
        remedy = "Install the extra: pip install 'tessera-llm[trace]', or leave --enable-trace out."
        raise ConfigError(
            [Conflict(("--enable-trace",), f"OpenTelemetry is not installed ({error})", remedy)]
        ) from None
    made: Tracing = recorded.Recorded(endpoint, service)
    return made


class Traced:
    """Middleware: a span for every call that is work. `logs`: a line for each, with its trace id."""

    def __init__(self, app: ASGIApp, tracing: Tracing, logs: bool) -> None:
        self._app, self._tracing, self._logs = app, tracing, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"] in POLLS:
            await self._app(scope, receive, send)
            return
        name, status = f"{scope['method']} {scope['path']}", None
        span = self._tracing.begin(name, Headers(scope=scope))
        if self._logs:
            log.info("Trace: %s trace=%s", name, span.trace_id)

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            scope["state"] = {**scope.get("state", {}), "span": span}
            await self._app(scope, receive, watch)
        finally:
            span.end(status)


def _id(size: int) -> str:
    """Random hex digits for `size` bytes; never all zeros."""
    return (secrets.randbits(8 * size) or 1).to_bytes(size, "big").hex()
