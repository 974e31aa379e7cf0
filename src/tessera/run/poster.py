"""A rank's end of hand-overs: it owns the transfer engine, writes what steps say, and fences writers.

The engine is used by one thread, which blocks until there is work or the engine has something to say.
What it has to tell it tells through `tell`, in that thread. All sends of a step to one rank of a peer are one batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from tessera.core.errors import DeadlineError, TesseraError
from tessera.core.mesh import Mesh
from tessera.plan.handoff import Fenced, Written
from tessera.plan.step import Send
from tessera.run.mailbox import Mailbox
from tessera.run.profiling import Traced
from tessera.transfer.base import Done, Engine, Runs
from tessera.transfer.copies import CopyPlan
from tessera.transfer.manifest import Manifest, Member

log = logging.getLogger(__name__)

CONNECT_S = 20.0
CLOSE_S = 10.0


class Connect(msgspec.Struct, tag=True, frozen=True):
    """Reach the ranks of a decode server, as `peer`; answered by `Connected`."""

    peer: str
    source: Manifest
    destination: Manifest


class Part(msgspec.Struct, tag=True, frozen=True):
    """`peer` is over: write nothing more to it."""

    peer: str


class Shut(msgspec.Struct, tag=True, frozen=True):
    """`peer` is over, whose ranks' engines are `writers`: fence them; answered by `Fenced`."""

    peer: str
    writers: tuple[str, ...]


class Connected(msgspec.Struct, tag=True, frozen=True):
    """The rank reaches those of `peer`, or `error`."""

    peer: str
    rank: int
    error: str | None = None


class Broke(msgspec.Struct, tag=True, frozen=True):
    """The rank can hand nothing over any more: a mistake of ours, on which the engine ends."""

    rank: int
    error: str


Order = Connect | Part | Shut
News = Connected | Fenced | Written | Broke | Traced


class Seat(msgspec.Struct, frozen=True):
    """How ranks of other servers reach a rank: its entry in the manifest, and the name of its transfer engine, by which
    it is fenced."""

    member: Member
    name: str


@dataclass(slots=True)
class _Route:
    """A peer: what goes where, and the names of the engines of those of its ranks that get something from here."""

    plan: CopyPlan
    names: dict[int, str]


@dataclass(slots=True)
class _Pending:
    """A send, and the batches that it is part of and that are not over."""

    send: Send
    batches: set[int] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)
    num_bytes: int = 0
    error: str | None = None


class Poster:
    """Posts the sends of one rank, whose entry in the manifest is `member`. Its methods may be called from any thread,
    and return at once."""

    def __init__(self, engine: Engine, mesh: Mesh, rank: int, member: Member, tell: Callable[[News], None]) -> None:
        self.seat = Seat(member, engine.name)
        self._engine, self._rank, self._dp_rank, self._tell = engine, rank, mesh.coordinate(rank, "dp"), tell
        self._work: Mailbox[Order | Sequence[Send] | None] = Mailbox()
        self._routes: dict[str, _Route] = {}
        self._batches: dict[int, list[_Pending]] = {}
        self._thread = threading.Thread(target=self._run, name=f"tessera-poster-{rank}", daemon=True)
        self._thread.start()

    def order(self, order: Order) -> None:
        """Takes an order."""
        self._work.put(order)

    def post(self, sends: Sequence[Send]) -> None:
        """Writes what a step has computed; answered by a `Written` for each."""
        self._work.put(sends)

    def close(self) -> None:
        """Ends it; what is under way fails."""
        self._work.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("the transfer engine of rank %d is left to itself: it is busy since %g s", self._rank, CLOSE_S)

    # -- in its thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._work_on()
        except BaseException as error:
            log.exception("rank %d hands nothing over any more", self._rank)
            self._tell(Broke(self._rank, f"{type(error).__name__}: {error}"))
            self._engine.close()

    def _work_on(self) -> None:
        while True:
            for work in self._work.take():
                if work is None:
                    self._engine.close()
                    return
                self._take(work)
            self._poll()
            self._engine.wait(self._work.there, None)

    def _take(self, work: Order | Sequence[Send]) -> None:
        match work:
            case Connect():
                self._connect(work)
            case Part(peer):
                self._routes.pop(peer, None)
            case Shut(peer, writers):
                self._shut(peer, writers)
            case _:
                by_peer: dict[str, list[Send]] = {}
                for send in work:
                    by_peer.setdefault(send.peer, []).append(send)
                for peer, sends in by_peer.items():
                    self._post(self._routes.get(peer), sends)

    def _connect(self, order: Connect) -> None:
        """To connect anew lifts the fence of an earlier session, so nothing of that may be under way."""
        error: str | None = None
        try:
            until = time.monotonic() + CONNECT_S
            while self._batches and time.monotonic() < until:
                self._engine.wait(None, until - time.monotonic())
                self._poll()
            if self._batches:
                raise DeadlineError(f"writes of an earlier session are under way for {CONNECT_S:g} s")
            plan = CopyPlan(order.source, order.destination)
            members = order.destination.members
            names = {to: self._engine.connect(members[to].endpoint, CONNECT_S) for to in plan.readers(self._rank)}
            self._routes[order.peer] = _Route(plan, names)
        except (TesseraError, ValueError) as failure:
            error = str(failure)
        self._tell(Connected(order.peer, self._rank, error))

    def _shut(self, peer: str, writers: tuple[str, ...]) -> None:
        for writer in writers:
            while True:
                try:
                    self._engine.fence(writer)
                    break
                except DeadlineError as error:  # the memory is in doubt: it must not be used before this ends
                    log.warning("rank %d: %s; asking again", self._rank, error)
        self._tell(Fenced(peer, self._rank))

    def _post(self, route: _Route | None, sends: list[Send]) -> None:
        """One batch for each rank of the peer that has something to get."""
        pending = [_Pending(send) for send in sends]
        if route is None:
            self._give_up(pending, "the decode server has gone")
            return
        batches: dict[int, tuple[list[Runs], list[_Pending]]] = {}
        try:
            for one in pending:
                for to, runs in self._runs(route.plan, one.send):
                    one.num_bytes += int(runs[:, 4].sum())
                    found, users = batches.setdefault(to, ([], []))
                    found.append(runs)
                    if not users or users[-1] is not one:  # its pages and its slot may go to the same rank
                        users.append(one)
            for to, (found, users) in batches.items():
                ticket = self._engine.write(route.names[to], np.concatenate(found))
                self._batches[ticket] = users
                for one in users:
                    one.batches.add(ticket)
        except (TesseraError, ValueError) as error:
            self._give_up([one for one in pending if not one.batches], str(error))
            for one in pending:
                one.error = str(error)
            return
        for one in pending:
            if not one.batches:
                self._report(one)

    def _runs(self, plan: CopyPlan, send: Send) -> list[tuple[int, Runs]]:
        found = []
        for source, to in plan.pairs(self._dp_rank, send.dp_rank):
            if source != self._rank:
                continue
            runs = (
                [plan.paged(source, to, send.pages.astype(np.int64), send.to_pages.astype(np.int64))]
                if len(send.pages)
                else []
            )
            if send.slot >= 0:
                runs.append(plan.slots(source, to, send.slot, send.to_slot))
            found += [(to, part) for part in runs if len(part)]
        return found

    def _give_up(self, pending: list[_Pending], error: str) -> None:
        for one in pending:
            one.error = error
            self._report(one)

    def _poll(self) -> None:
        for done in self._engine.poll():
            self._over(done)

    def _over(self, done: Done) -> None:
        for one in self._batches.pop(done.ticket, ()):
            one.batches.discard(done.ticket)
            one.error = one.error or (str(done.error) if done.error is not None else None)
            if not one.batches:
                self._report(one)

    def _report(self, one: _Pending) -> None:
        seconds = time.monotonic() - one.began
        self._tell(Written(one.send.ticket, self._rank, one.num_bytes, one.error, seconds))
