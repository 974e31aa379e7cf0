"""The transfer engine inside one process: the reference of the others, and what tests move bytes with.

Sides find each other in a `LocalNet`, one per test or process group. A batch is copied by `poll` of its writer, one
batch a call, so that a test can fence, close or change its mind between post and landing.
"""

from __future__ import annotations

import select
import threading
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from tessera.core.errors import PeerError
from tessera.transfer.base import FENCE_S, Done, PerRegion, Runs, check_runs


@dataclass
class LocalNet:
    """Where sides find each other."""

    sides: dict[str, LocalEngine] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)


class LocalEngine:
    """One side. `fence` and the landing of a batch exclude each other by the lock of the side that is written."""

    def __init__(self, net: LocalNet) -> None:
        self._net = net
        self._name = f"local-{next(net.numbers)}"
        self._regions: dict[int, Tensor] = {}
        self._fenced: set[str] = set()
        self._lock = threading.Lock()
        self._posted: deque[tuple[int, str, Runs]] = deque()
        self._tickets = count()
        self._closed = False
        net.sides[self._name] = self

    @property
    def name(self) -> str:
        """See `Engine.name`."""
        return self._name

    def register(self, region: int, memory: Tensor) -> None:
        """See `Engine.register`."""
        if not memory.is_contiguous():
            raise ValueError(f"region {region}: only contiguous memory can be registered")
        self._regions[region] = memory.view(-1).view(torch.uint8)

    def endpoint(self) -> bytes:
        """See `Engine.endpoint`."""
        return self._name.encode()

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        """See `Engine.connect`."""
        peer = self._find(endpoint.decode())
        with peer._lock:
            peer._fenced.discard(self._name)
        return peer.name

    def write(self, peer: str, runs: Runs) -> int:
        """See `Engine.write`."""
        target = self._net.sides.get(peer)
        if target is not None:
            check_runs(runs, PerRegion(self._sizes(), target._sizes()))
        ticket = next(self._tickets)
        self._posted.append((ticket, peer, runs))
        return ticket

    def poll(self) -> list[Done]:
        """See `Engine.poll`."""
        if not self._posted:
            return []
        ticket, peer, runs = self._posted.popleft()
        try:
            self._land(self._find(peer), runs)
        except PeerError as error:
            return [Done(ticket, error)]
        return [Done(ticket)]

    def wait(self, also: int | None, seconds: float | None) -> None:
        """See `Engine.wait`."""
        if not self._posted:
            select.select([also] if also is not None else [], [], [], None if seconds is None else max(seconds, 0))

    def _land(self, peer: LocalEngine, runs: Runs) -> None:
        with peer._lock:
            if self._closed or peer._closed:
                raise PeerError(f"{self._name if self._closed else peer.name} has left")
            if self._name in peer._fenced:
                raise PeerError(f"{peer.name} has fenced {self._name}")
            for source, at, destination, to, length in runs.tolist():
                peer._regions[destination][to : to + length] = self._regions[source][at : at + length]

    def fence(self, writer: str, deadline_s: float = FENCE_S) -> None:
        """See `Engine.fence`."""
        with self._lock:
            self._fenced.add(writer)

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closed = True
            self._net.sides.pop(self._name, None)

    def _find(self, name: str) -> LocalEngine:
        peer = self._net.sides.get(name)
        if peer is None:
            raise PeerError(f"there is no peer '{name}'; known: {sorted(self._net.sides)}")
        return peer

    def _sizes(self) -> dict[int, int]:
        return {number: memory.numel() for number, memory in self._regions.items()}
