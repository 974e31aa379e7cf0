"""What all endpoints of the router share: servers, the HTTP client, and what runs right now."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tessera.serve.http import Call
from tessera.serve.router.circuit import Standing
from tessera.serve.router.connections import Connections
from tessera.serve.router.exchange import Aborts
from tessera.serve.router.metrics import Metrics
from tessera.serve.router.policy import POLICIES
from tessera.serve.router.servers import Address, Fleet, Role, Server, mode_of
from tessera.serve.trace import Tracing

log = logging.getLogger(__name__)
PASSED = ("authorization", "x-request-id")  # headers of the client that servers get
DECODE_POLICY = {"cache_aware": "least_loaded"}  # a decode server computes no prompts, so it has no prefixes to reuse


@dataclass(frozen=True, slots=True)
class Options:
    """How the router was started. Times in seconds. `silence`: that a server may let a request wait for its next byte.

    `policies` of roles that have one of their own. `interval`: between two probes of a server that is up.
    """

    servers: tuple[Address, ...]
    policy: str = "cache_aware"
    policies: dict[Role, str] = field(default_factory=dict)
    api_key: str | None = None
    silence: float = 1800.0
    threshold: int = 3
    interval: float = 5.0
    probe_timeout: float = 5.0
    drain_timeout: float = 30.0
    max_body_size: int = 32 << 20
    log_requests: bool = False

    def policy_of(self, role: Role) -> str:
        """The policy for servers of one role."""
        return self.policies.get(role) or (
            DECODE_POLICY.get(self.policy, self.policy) if role == "decode" else self.policy
        )


class Router:
    """One router. `stopping`: nothing new is taken."""

    def __init__(self, options: Options, tracing: Tracing | None = None) -> None:
        self.options = options
        self.tracing = tracing or Tracing()
        self.metrics = Metrics()
        self.started = time.time()
        servers = [Server(address, self.metrics, options.threshold, self._changed) for address in options.servers]
        roles = {server.address.role for server in servers}
        self.fleet = Fleet(servers, {role: POLICIES[options.policy_of(role)]() for role in roles})
        self.connections = Connections(options.silence)  # for tokens
        self.http = httpx.AsyncClient(timeout=options.probe_timeout, trust_env=False)  # for all else
        self.aborts = Aborts(self.http)
        self.running: set[asyncio.Task[None]] = set()
        self.stopping = False

    @property
    def trouble(self) -> str | None:
        """Why no request can be taken, or None."""
        return "the router is shutting down" if self.stopping else self.fleet.trouble()

    def headers(self, call: Call | None = None) -> dict[str, str]:
        """What servers are sent besides a body: the router's own key, else that of the client."""
        found = {name: call.headers[name] for name in PASSED if call is not None and name in call.headers}
        if self.options.api_key is not None:
            found["authorization"] = f"Bearer {self.options.api_key}"
        return {**found, "content-type": "application/json"}

    async def watch(self) -> None:
        """Probes every server for ever, each at its own pace."""
        async with asyncio.TaskGroup() as group:
            for server in self.fleet.servers:
                group.create_task(self._watch(server))

    async def _watch(self, server: Server) -> None:
        circuit, told = server.circuit, set[str]()
        while True:
            wrong = await self._probe(server)
            now = time.monotonic()
            circuit.probed(wrong, now)
            if circuit.standing is Standing.UNKNOWN and circuit.reason not in told:  # each reason once
                told.add(circuit.reason)
                began = time.strftime("%H:%M:%S", time.localtime(time.time() - (now - circuit.since)))
                log.info("Waiting for %s %s since %s: %s", server.address.role, server.url, began, circuit.reason)
            await asyncio.sleep(self.options.interval if circuit.takes else min(self.options.interval, 1.0))

    def _changed(self, server: Server, seconds: float) -> None:
        """A server's standing is another, by a probe or by requests. `seconds`: for which it was what it was."""
        circuit = server.circuit
        server.show_standing()
        down = circuit.standing is Standing.DOWN
        if down:
            self.fleet.lost(server)
        why = f": {circuit.reason}" if circuit.reason else f", after {seconds:.1f} s"
        level = logging.WARNING if down else logging.INFO
        log.log(level, "%s %s is %s%s", server.address.role, server.url, circuit.standing, why)

    async def _probe(self, server: Server) -> str | None:
        """What is wrong with a server, or None; learns what it tells of itself whenever it was not up before."""
        try:
            async with asyncio.timeout(self.options.probe_timeout):
                answer = await self.http.get(f"{server.url}/health", headers=self.headers())
                if answer.status_code != 200:
                    return f"/health says {answer.status_code}"
                if not server.circuit.takes:
                    server.learn(await self._info(server))
        except (httpx.HTTPError, TimeoutError) as error:
            return f"/health: {type(error).__name__} {error}".strip()
        mode, role = mode_of(server.info), server.address.role
        expected = {"worker": "null"}.get(role, role)
        if mode is not None and mode != expected:
            return f"it runs with --disaggregation-mode {mode}, but was given as a {role} server"
        return None

    async def _info(self, server: Server) -> dict[str, Any]:
        answer = await self.http.get(f"{server.url}/server_info", headers=self.headers())
        if answer.status_code == 404:  # SGLang's name of it for long
            answer = await self.http.get(f"{server.url}/get_server_info", headers=self.headers())
        try:
            found = answer.json() if answer.status_code == 200 else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    async def drain(self) -> None:
        """Takes nothing new, lets what runs finish within `drain_timeout`, then ends it."""
        self.stopping = True
        if running := set(self.running):
            log.info("%d requests run; they have %g s to finish", len(running), self.options.drain_timeout)
            await asyncio.wait(running, timeout=self.options.drain_timeout)
        left = {task for task in self.running if not task.done()}
        if left:
            log.warning("%d requests are aborted", len(left))
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def close(self) -> None:
        """Gives back what the router holds."""
        await self.aborts.settled()
        await self.connections.close()
        await self.http.aclose()
        await asyncio.to_thread(self.tracing.close)
