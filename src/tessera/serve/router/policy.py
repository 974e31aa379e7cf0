"""Which server gets a request. Pure: no sockets, no clock, no chance.

`choose` names one of the candidates (servers that are up) by its key; `loads` are the prompts that each has in flight.
Every policy is told what was chosen in the end (`took`), so that whatever overrules it is remembered too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tessera.serve.router.prefixes import Prefixes

Prompt = str | Sequence[int] | None
Loads = Mapping[str, int]


class Policy(Protocol):
    """How to choose among servers of one role."""

    def choose(self, loads: Loads, prompt: Prompt) -> str:
        """One key of `loads`, which is not empty."""

    def took(self, server: str, prompt: Prompt) -> None:
        """The request went to `server`."""

    def forget(self, server: str) -> None:
        """`server` was lost: whatever it had cached is gone."""


class RoundRobin(Policy):
    """Each in turn. A server that comes or goes moves nobody else's turn."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}
        self._next = 0

    def choose(self, loads: Loads, prompt: Prompt) -> str:
        """The one whose last turn is longest ago; in the order of `loads` among those that had none."""
        return min(loads, key=lambda server: self._turns.get(server, -1))

    def took(self, server: str, prompt: Prompt) -> None:
        self._turns[server] = self._next
        self._next += 1

    def forget(self, server: str) -> None:
        """Turns stay: a server that comes back is not flooded."""


class LeastLoaded(Policy):
    """The one with the fewest prompts in flight; in turn among equals."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def choose(self, loads: Loads, prompt: Prompt) -> str:
        least = min(loads.values())
        return self._turns.choose({server: load for server, load in loads.items() if load == least}, prompt)

    def took(self, server: str, prompt: Prompt) -> None:
        self._turns.took(server, prompt)

    def forget(self, server: str) -> None:
        self._turns.forget(server)


class CacheAware(Policy):
    """The server that saw most of the prompt's beginning before, unless the load is uneven.

    The idea, its thresholds and their names are SGLang's router's (docs.sglang.io, "SGLang Model Gateway",
    cache-aware load balancing): loads are uneven when the largest exceeds the smallest by more than `balance_abs`
    prompts and by more than the factor `balance_rel`; then, and where less than the share `threshold` of the prompt
    was seen anywhere, the least loaded server takes it.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        balance_abs: int = 64,
        balance_rel: float = 1.5,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._threshold, self._abs, self._rel = threshold, balance_abs, balance_rel
        self._prefixes = prefixes or Prefixes()
        self._least = LeastLoaded()

    def choose(self, loads: Loads, prompt: Prompt) -> str:
        if len(loads) > 1 and not self._uneven(loads) and prompt:
            seen = self._prefixes.shares(prompt)
            best = max((seen.get(server, 0.0) for server in loads), default=0.0)
            if best > 0 and best >= self._threshold:
                loads = {server: load for server, load in loads.items() if seen.get(server, 0.0) == best}
        return self._least.choose(loads, prompt)

    def _uneven(self, loads: Loads) -> bool:
        most, least = max(loads.values()), min(loads.values())
        return most - least > self._abs and most > self._rel * least

    def took(self, server: str, prompt: Prompt) -> None:
        self._least.took(server, prompt)
        if prompt:
            self._prefixes.add(server, prompt)

    def forget(self, server: str) -> None:
        self._prefixes.remove(server)


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "cache_aware": CacheAware,
}
