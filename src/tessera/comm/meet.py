"""How the ranks of an instance find each other: through a store that rank 0 keeps at an address all of them know."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import msgspec
import torch.distributed as dist

from tessera.core.errors import ConfigError, Conflict, DeadlineError, PeerError
from tessera.core.mesh import Mesh

_POLL_S = 0.02


class Card(msgspec.Struct, frozen=True):
    """What a rank says of itself when it joins."""

    host: str
    pid: int
    mesh: str
    kind: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Meeting:
    """The ranks that met. Its store lives as long as rank 0 keeps the meeting."""

    mesh: Mesh
    rank: int
    store: dist.Store
    cards: tuple[Card, ...]
    until: float  # of time.monotonic

    def all_at(self, point: str) -> None:
        """Waits until every rank has come to `point`; rank 0, which keeps the store, until all know that they have.

        Raises DeadlineError, PeerError.
        """
        with _rank_0(point):
            self.store.set(f"{point}/{self.rank}", "")
            self._wait(point)
            self.store.set(f"all {point}/{self.rank}", "")
            if self.rank == 0:
                self._wait(f"all {point}")

    def say(self, word: str, text: str) -> None:
        """Tells the others something, once."""
        self.store.set(word, text)

    def ask(self, word: str) -> str:
        """What a rank says under `word`; waits for it."""
        with _rank_0(word):
            text: str = self.store.get(word).decode()
            return text

    def _wait(self, point: str) -> None:
        _wait_for_all(self.store, self.mesh, point, self.until, lambda rank: str(self.cards[rank]))


def meet(mesh: Mesh, rank: int, address: str, kind: str, seconds: float, listening: int | None = None) -> Meeting:
    """Joins the others at `address` (host:port, on the host of rank 0), within `seconds`.

    `listening`: at rank 0, the descriptor of a socket that listens there already; without it rank 0 opens the port.

    Raises DeadlineError naming the ranks that did not come, PeerError when rank 0 gave up, ConfigError when the port is
    taken, two processes are the same rank, or the ranks disagree about the mesh or the `kind` of collectives.
    """
    until = time.monotonic() + seconds
    store = _open(rank, address, seconds, listening)
    mine = Card(socket.gethostname(), os.getpid(), repr(mesh), kind)
    with _rank_0("joined"):
        held = store.compare_set(f"joined/{rank}", "", msgspec.json.encode(mine).decode())
        if (other := msgspec.json.decode(held, type=Card)) != mine:
            raise _refused(rank, f"{other} is that rank already", "Give each node its own --node-rank")
        _wait_for_all(store, mesh, "joined", until, lambda rank: "unknown")
        cards = [msgspec.json.decode(store.get(f"joined/{r}"), type=Card) for r in range(mesh.size)]
    for r, card in enumerate(cards):
        if (card.mesh, card.kind) != (mine.mesh, mine.kind):
            found = f"rank {r} ({card}) has {card.kind}, {card.mesh}; here it is {kind}, {mine.mesh}"
            raise _refused(rank, found, "Start every node with the same flags")
    return Meeting(mesh, rank, store, tuple(cards), until)


def _refused(rank: int, reason: str, remedy: str) -> ConfigError:
    return ConfigError([Conflict(("--dist-init-addr", f"rank {rank}"), reason, remedy)])


def _open(rank: int, address: str, seconds: float, listening: int | None) -> dist.Store:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise _refused(rank, f"'{address}' is no address", "Give host:port")
    limit = timedelta(seconds=seconds)
    try:
        return dist.TCPStore(
            host.strip("[]"),
            int(port),
            is_master=rank == 0,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=False,
            master_listen_fd=listening,
        )
    except dist.DistError as error:
        if rank == 0:
            raise _refused(rank, f"cannot listen at {address}: {_first_line(error)}", "Choose a free port") from error
        raise DeadlineError(f"rank {rank} waited {seconds} s for rank 0 at {address}: {_first_line(error)}") from error


def _wait_for_all(store: dist.Store, mesh: Mesh, point: str, until: float, who: Callable[[int], str]) -> None:
    """Polls, so that at the deadline it is known who was missing."""
    missing = list(range(mesh.size))
    while missing := [r for r in missing if not store.check([f"{point}/{r}"])]:
        if time.monotonic() > until:
            names = ", ".join(f"{r} ({who(r)})" for r in missing)
            raise DeadlineError(f"of {mesh.size} ranks these did not come in time to '{point}': {names}")
        time.sleep(_POLL_S)


@contextmanager
def _rank_0(point: str) -> Iterator[None]:
    """The store is in the process of rank 0: when it fails, that has gone."""
    try:
        yield
    except dist.DistError as error:
        raise PeerError(f"rank 0 has left before all ranks met at '{point}'") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
