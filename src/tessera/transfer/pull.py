"""The engine behind all ways to move bytes between processes: **the side that is written does the copying**.

The writer's `write` is a request on a socket; a thread of the reader, one for each writer, copies from the writer's
memory and acknowledges. So `fence` is a matter of this process alone: the thread stops, and what it had begun is over
or torn down before `fence` returns, whether the writer lives, hangs or is dead. A peer that wrote by itself could be
stopped by its own consent only. What copies is a `Mover`.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import time
from collections import deque
from itertools import count

import msgspec
import numpy as np
import torch
from torch import Tensor

from tessera.core.errors import DeadlineError, PeerError
from tessera.transfer.base import FENCE_S, Done, PerRegion, Runs, check_runs
from tessera.transfer.mover import Mover
from tessera.transfer.readers import Readers, sizes_of
from tessera.transfer.wire import (
    PROTOCOL,
    Batch,
    Channel,
    Endpoint,
    Heard,
    Hello,
    Landed,
    Parting,
    Welcome,
    dial,
    pack,
)


class PullEngine:
    """See `Engine`. One thread may call it; the copying is done by threads of its own."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._name = f"{mover.kind}-{os.getpid()}-{secrets.token_hex(8)}"
        self._regions: dict[int, Tensor] = {}
        self._readers = Readers(self._name, mover, self._regions)
        self._peers: dict[str, _Peer] = {}
        self._over: deque[Done] = deque()
        self._tickets = count()

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
        """See `Engine.endpoint`. Opens the door at the first call."""
        address, sizes = self._readers.open_door(), sizes_of(self._regions)
        return msgspec.msgpack.encode(Endpoint(self._mover.kind, PROTOCOL, self._name, address, sizes))

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        """See `Engine.connect`."""
        try:
            there = msgspec.msgpack.decode(endpoint, type=Endpoint)
        except msgspec.DecodeError as error:
            raise PeerError(f"not the endpoint of a transfer engine: {error}") from error
        if (there.kind, there.protocol) != (self._mover.kind, PROTOCOL):
            found = f"{there.name} is {there.kind} with protocol {there.protocol}"
            raise PeerError(f"{found}, this side {self._mover.kind} with {PROTOCOL}")
        if (old := self._peers.pop(there.name, None)) is not None:
            self._over += old.fail(PeerError(f"connected to {there.name} anew"))
        sizes, exported = sizes_of(self._regions), self._mover.export(self._regions)
        hello = Hello(PROTOCOL, self._mover.kind, self._name, there.name, sizes, exported)
        self._peers[there.name] = _Peer(there, PerRegion(sizes, there.sizes), _greet(there, hello, deadline_s))
        return there.name

    def write(self, peer: str, runs: Runs) -> int:
        """See `Engine.write`."""
        if (found := self._peers.get(peer)) is None:
            raise ValueError(f"'{peer}' is no peer; connected: {sorted(self._peers)}")
        runs = np.asfortranarray(runs, np.int64)
        check_runs(runs, found.sizes)
        ticket = next(self._tickets)
        found.post(ticket, runs)
        return ticket

    def poll(self) -> list[Done]:
        """See `Engine.poll`."""
        for peer in self._peers.values():
            self._over += peer.poll()
        done = list(self._over)
        self._over.clear()
        return done

    def wait(self, also: int | None, seconds: float | None) -> None:
        """See `Engine.wait`."""
        if self._over or any(peer.failed for peer in self._peers.values()):
            return
        poller = select.poll()
        for peer in self._peers.values():
            peer.watch(poller)
        if also is not None:
            poller.register(also, select.POLLIN)
        poller.poll(None if seconds is None else 1000 * max(seconds, 0))

    def fence(self, writer: str, deadline_s: float = FENCE_S) -> None:
        """See `Engine.fence`."""
        self._readers.fence(writer, deadline_s)

    def close(self) -> None:
        """See `Engine.close`."""
        for peer in self._peers.values():
            self._over += peer.fail(PeerError(f"{self._name} has left"))
        self._readers.close()
        self._mover.close()


def _greet(there: Endpoint, hello: Hello, deadline_s: float) -> socket.socket:
    """A connection on which the reader has said welcome."""
    deadline = time.monotonic() + deadline_s
    try:
        sock = dial(there.address, deadline_s)
    except TimeoutError as error:
        raise DeadlineError(f"{there.name} at {there.address} did not answer within {deadline_s} s") from error
    except OSError as error:
        raise PeerError(f"{there.name} cannot be reached at {there.address}: {error}") from error
    try:
        sock.sendall(pack(hello))
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        answer = Heard(sock).next() or Parting("it closed the connection")
    except TimeoutError as error:
        sock.close()
        raise DeadlineError(f"{there.name} did not say welcome within {deadline_s} s") from error
    except OSError as error:
        sock.close()
        raise PeerError(f"{there.name} left while it was greeted: {error}") from error
    if answer != Welcome():
        sock.close()
        reason = answer.error if isinstance(answer, Welcome) else getattr(answer, "reason", answer)
        raise PeerError(f"{there.name} refuses: {reason}")
    return sock


class _Peer:
    """A reader as its writer sees it."""

    def __init__(self, endpoint: Endpoint, sizes: PerRegion, sock: socket.socket) -> None:
        self.endpoint, self.sizes = endpoint, sizes
        self._channel = Channel(sock)
        self._pending: set[int] = set()
        self._gone: PeerError | None = None

    def post(self, ticket: int, runs: Runs) -> None:
        """Asks the reader for the copies."""
        self._pending.add(ticket)
        if self._gone is None:
            self._channel.send(Batch(ticket, runs.T.tobytes()))

    def poll(self) -> list[Done]:
        """What is over since the last call."""
        if self._gone is not None:
            return self.fail(self._gone)
        found, there = self._channel.exchange()
        done = [self._landed(message) for message in found if isinstance(message, Landed)]
        reasons = [message.reason for message in found if isinstance(message, Parting)]
        if reasons or not there:
            done += self.fail(PeerError(f"{self.endpoint.name} {reasons[0] if reasons else 'has left'}"))
        return done

    @property
    def failed(self) -> bool:
        """Some batches are over because the peer has gone."""
        return self._gone is not None and bool(self._pending)

    def watch(self, poller: select.poll) -> None:
        """Has `poller` wait for what the peer says, and for when it takes what was not sent yet."""
        if self._gone is None:
            poller.register(self._channel.file, select.POLLIN | (select.POLLOUT if self._channel.full else 0))

    def _landed(self, message: Landed) -> Done:
        self._pending.discard(message.ticket)
        error = None if message.error is None else PeerError(f"{self.endpoint.name}: {message.error}")
        return Done(message.ticket, error)

    def fail(self, error: PeerError) -> list[Done]:
        """Gives the peer up; all that is under way has failed."""
        self._gone = error
        self._channel.close()
        done = [Done(ticket, error) for ticket in sorted(self._pending)]
        self._pending.clear()
        return done
