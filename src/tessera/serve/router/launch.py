"""`tessera router`: one process before many servers, until a signal.

Exit codes: 0 after a signal, once what ran has ended; 128 + signal after a second one.
"""

from __future__ import annotations

import asyncio
import logging

import uvloop

from tessera.core.errors import PeerError
from tessera.serve import logs
from tessera.serve.listener import Listener, bind, url
from tessera.serve.router.app import make_app
from tessera.serve.router.router import Options, Router
from tessera.serve.signals import StopSignals
from tessera.serve.trace import make_tracing

log = logging.getLogger(__name__)
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}


def launch(options: Options, host: str, port: int, level: str = "info", trace: tuple[bool, str] = (False, "")) -> int:
    """Serves until a signal; returns the exit code. `trace`: whether spans are recorded, and where they go."""
    logs.configure(level)
    return uvloop.run(_launch(options, host, port, trace))


async def _launch(options: Options, host: str, port: int, trace: tuple[bool, str]) -> int:
    signals = StopSignals()
    router = Router(options, make_tracing(*trace, "tessera-router"))
    for server in router.fleet.servers:
        told = f", bootstrap port {server.address.bootstrap_port or 'as it tells'}"
        log.info("%s %s%s", server.address.role, server.url, told if server.address.role == "prefill" else "")
    hosts = {role: {s.address.host for s in router.fleet.of(role)} for role in router.fleet.roles}
    if hosts.get("prefill", set()) & LOOPBACK and hosts["decode"] - LOOPBACK:
        log.warning("Decode servers are told to meet a prefill server at a loopback address: name it as they reach it")
    log.info("Policy: %s", ", ".join(f"{role} {options.policy_of(role)}" for role in router.fleet.roles))
    with bind(host, port) as listening:
        listener = Listener(make_app(router), listening, options.log_requests)
        watching = asyncio.create_task(router.watch())
        stop = asyncio.create_task(signals.first.wait())
        log.info("Routing at %s", url(listening))
        try:
            await asyncio.wait({watching, stop, listener.task}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                raise (
                    PeerError("the HTTP listener has ended") if listener.task.done() else PeerError("probing has ended")
                )
            await router.drain()
        finally:
            await listener.close()
            for task in (watching, stop):
                task.cancel()
            await asyncio.gather(watching, stop, return_exceptions=True)
            await router.close()
    return 0
