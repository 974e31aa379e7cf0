"""The servers behind the router: what is known of each, what each has in flight, and the choice of one of each role."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal
from urllib.parse import urlsplit

from tessera.serve.http import UnavailableError
from tessera.serve.router.circuit import Circuit, Standing
from tessera.serve.router.metrics import Metrics
from tessera.serve.router.policy import Policy, Prompt
from tessera.serve.router.rooms import Meeting

Role = Literal["prefill", "decode", "worker"]
BOOTSTRAP_PORT = 8998  # where nobody names another, here and in SGLang
Outcome = Literal["ok", "refused", "failed", "timeout", "cancelled"]


@dataclass(frozen=True, slots=True)
class Address:
    """A server as it was named. `bootstrap_port`: of a prefill server, where it is known."""

    url: str
    role: Role
    bootstrap_port: int | None = None

    @property
    def host(self) -> str:
        """The host for a URL: IPv6 addresses in brackets."""
        name = urlsplit(self.url).hostname or ""
        return f"[{name}]" if ":" in name else name


class Server:
    """One server. `info`: what it last told of itself. `changed`: see `Circuit`."""

    def __init__(
        self, address: Address, metrics: Metrics, threshold: int, changed: Callable[[Server, float], None]
    ) -> None:
        self.address = address
        self.circuit = Circuit(threshold, time.monotonic(), lambda seconds: changed(self, seconds))
        self.info: dict[str, Any] = {}
        self.in_flight = 0
        self.ranks = [0]  # prompts in flight of each data-parallel rank, as far as it was chosen here
        labels = (address.url, address.role)
        self._requests = {
            outcome: metrics.requests.labels(*labels, outcome)
            for outcome in ("ok", "refused", "failed", "timeout", "cancelled")
        }
        self._gauge, self._up = metrics.in_flight.labels(*labels), metrics.up.labels(*labels)
        self._first, self._whole = metrics.first.labels(*labels), metrics.whole.labels(*labels)

    @property
    def url(self) -> str:
        """Its address without a slash at the end."""
        return self.address.url

    def rank(self) -> int:
        """The data-parallel rank with the fewest prompts in flight."""
        return self.ranks.index(min(self.ranks))

    def learn(self, info: dict[str, Any]) -> None:
        """What it tells of itself. Another instance behind the same address may have other ranks."""
        self.info = info
        if (dp := ranks_of(info)) != len(self.ranks):
            self.ranks = [0] * dp

    def meeting(self) -> Meeting:
        """Where decode servers meet it."""
        port = self.address.bootstrap_port or bootstrap_port_of(self.info) or BOOTSTRAP_PORT
        return Meeting(self.address.host, port, len(self.ranks))

    def show_standing(self) -> None:
        """Tells the metrics whether it is up."""
        self._up.set(self.circuit.standing is Standing.UP)

    def state(self) -> dict[str, Any]:
        """For people and `/workers`."""
        circuit = self.circuit
        shown: dict[str, Any] = {
            "url": self.url,
            "worker_type": "regular" if self.address.role == "worker" else self.address.role,
            "is_healthy": circuit.standing is Standing.UP,
            "standing": str(circuit.standing),
            "reason": circuit.reason,
            "for_s": round(time.monotonic() - circuit.since, 1),
            "load": self.in_flight,
        }
        if self.address.role == "prefill":
            shown |= {"bootstrap_port": self.meeting().port, "dp_size": len(self.ranks)}
        return shown


class Use:
    """One request's claim on a server, from its choice to `end`. `prompts`: how many it holds. `rank`: see `rooms`."""

    def __init__(self, server: Server, prompts: int, rank: int | None = None) -> None:
        self.server, self._prompts = server, prompts
        self._began = time.monotonic()
        self._ranks = server.ranks if rank is not None else None
        self.rank = rank or 0
        self._open = True
        server.circuit.sent()
        self._add(prompts)

    def answered(self) -> None:
        """The answer begins, and well."""
        now = time.monotonic()
        self.server._first.observe(now - self._began)
        self.server.circuit.answered(now)

    def end(self, outcome: Outcome, why: str = "") -> None:
        """The request is over for this server; only the first call counts."""
        if not self._open:
            return
        self._open = False
        now, circuit = time.monotonic(), self.server.circuit
        if outcome in ("failed", "timeout"):
            circuit.fault(why, now)
        elif outcome == "cancelled":
            circuit.dropped()
        else:
            circuit.good(now)
            self.server._whole.observe(now - self._began)
        self.server._requests[outcome].inc()
        self._add(-self._prompts)

    def _add(self, prompts: int) -> None:
        self.server.in_flight += prompts
        self.server._gauge.inc(prompts)
        if self._ranks is not None:
            self._ranks[self.rank] += prompts


class Fleet:
    """All servers, and a policy for each role."""

    def __init__(self, servers: Sequence[Server], policies: Mapping[Role, Policy]) -> None:
        self.servers = tuple(servers)
        self._policies = policies
        self.roles: tuple[Role, ...] = tuple(dict.fromkeys(server.address.role for server in servers))

    def of(self, role: Role) -> list[Server]:
        """The servers of one role."""
        return [server for server in self.servers if server.address.role == role]

    def trouble(self, avoid: frozenset[str] = frozenset()) -> str | None:
        """Why no request can be taken, or None."""
        for role in self.roles:
            if not self._candidates(role, avoid):
                told = "; ".join(f"{s.url}: {s.circuit.standing} ({s.circuit.reason})" for s in self.of(role))
                return f"no {role} server takes requests now: {told}"
        return None

    def pick(self, prompt: Callable[[], Prompt], prompts: int, avoid: frozenset[str] = frozenset()) -> dict[Role, Use]:
        """One server of each role. Raises UnavailableError, having claimed none, where a role has none.

        `prompt` is asked where a role has several: long ones take time to be looked at.
        """
        if (trouble := self.trouble(avoid)) is not None:
            raise UnavailableError(trouble)
        known = prompt() if len(self.servers) > len(self.roles) else None
        return {role: self._claim(role, known, prompts, avoid) for role in self.roles}

    def lost(self, server: Server) -> None:
        """`server` has gone down: what it had cached is gone."""
        self._policies[server.address.role].forget(server.url)

    def _candidates(self, role: Role, avoid: frozenset[str]) -> list[Server]:
        return [server for server in self.of(role) if server.circuit.takes and server.url not in avoid]

    def _claim(self, role: Role, prompt: Prompt, prompts: int, avoid: frozenset[str]) -> Use:
        found = {server.url: server for server in self._candidates(role, avoid)}
        policy = self._policies[role]
        url = policy.choose({url: server.in_flight for url, server in found.items()}, prompt)
        policy.took(url, prompt)
        server = found[url]
        return Use(server, prompts, server.rank() if role == "prefill" and prompts == 1 else None)


def ranks_of(info: Mapping[str, Any]) -> int:
    """Data-parallel ranks, as our `/server_info` and SGLang's tell them; 1 where they do not."""
    mesh = _group(info, "mesh")
    sizes = (mesh.get("dp", 1), mesh.get("replicas", 1)) if mesh else (info.get("dp_size", 1),)
    return prod(sizes) if all(type(size) is int and size > 0 for size in sizes) else 1


def bootstrap_port_of(info: Mapping[str, Any]) -> int | None:
    """The bootstrap port, as `/server_info` tells it: the one that was bound, where any free one was asked for."""
    engine = info.get("engine")
    bound = str(engine.get("bootstrap")).rpartition(":")[2] if isinstance(engine, dict) else ""
    if bound.isdecimal():
        return int(bound)
    found = _group(info, "handover").get("bootstrap_port", info.get("disaggregation_bootstrap_port"))
    return found if isinstance(found, int) else None


def mode_of(info: Mapping[str, Any]) -> str | None:
    """The part that a server plays (prefill, decode or null); None where it does not tell."""
    found = _group(info, "handover").get("role", info.get("disaggregation_mode"))
    return found if isinstance(found, str) else None


def _group(info: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of our configuration; empty where there is none."""
    config = info.get("config")
    group = config.get(name) if isinstance(config, dict) else None
    return group if isinstance(group, dict) else {}
