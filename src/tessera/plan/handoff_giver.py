"""The prefill side of every room; see `handoff.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

from tessera.core.messages import HandoverTimes, TokenLogprobs
from tessera.plan.handoff import (
    ABORTED,
    Action,
    Cancelled,
    Closed,
    Computed,
    End,
    First,
    Free,
    Gone,
    HandoffConfig,
    Heard,
    Inner,
    Joined,
    Noted,
    Opened,
    Over,
    Prompt,
    Refused,
    Reserve,
    Sent,
    Start,
    Tell,
    Ticketed,
    Why,
    Wire,
    Written,
)
from tessera.plan.handoff_rooms import Rooms
from tessera.plan.step import Clock

# Stages of a room. Half of a pair: only the request is here, only the reservation, a request that was refused, or one
# that has not come and that decode wants no more.
EXPECTED, OFFERED, REFUSED, UNWANTED = "expected", "offered", "refused", "unwanted"
SENDING, STOPPING, TOLD = "sending", "stopping", "told"  # STOPPING: it has failed, and writes are under way
NUM_BEFORE, NUM_MARKS = 2, 5  # marks of a room of which nothing is planned yet, and of one that is written


@dataclass(slots=True)
class Giving:
    """A room at prefill. `key` -1: no request. `tickets`: ranks that still write, by ticket; `last`: all are out.
    `awaits`: the ranks have not told yet what goes into the record."""

    room: int
    stage: str
    deadline: float = inf
    key: int = -1
    prompt: Prompt | None = None
    peer: str = ""
    reserve: Reserve | None = None
    tickets: dict[int, set[int]] = field(default_factory=dict)
    last: bool = False
    num_bytes: int = 0
    num_cached: int = 0
    writing: float = 0.0
    slowest: float = 0.0  # rank of a ticket, so far
    why: Why = ABORTED
    awaits: bool = False
    scores: list[TokenLogprobs] | None = None
    first: First | None = None
    marks: list[float] = field(default_factory=list)  # when it came, was asked for, begun, computed, and written


def times_of(room: Giving) -> HandoverTimes:
    """What it took, once it is written."""
    came, asked, begun, computed, written = room.marks
    return HandoverTimes(
        asked - came,
        begun - asked,
        computed - begun,
        written - computed,
        writing=room.writing,
        num_bytes=room.num_bytes,
        ended=written,
    )


class Giver(Rooms[Giving]):
    """All rooms of a prefill server, by their number, and what was closed of each peer."""

    def __init__(self, config: HandoffConfig) -> None:
        super().__init__(config)
        self.keys: dict[int, Giving] = {}
        self.stopping: list[Giving] = []  # no longer in `rooms`: a new request may have their number
        self.tickets: dict[int, Giving] = {}
        self.routes: dict[tuple[str, int], Giving] = {}
        self.closed: dict[str, dict[int, Why | None]] = {}  # peer -> generation -> why, None: it was sent
        self.floors: dict[str, int] = {}
        self.peers: set[str] = set()

    @property
    def idle(self) -> bool:
        """No writes are under way, and nobody waits for an answer."""
        return not self.keys and not self.stopping

    def apply(self, event: Wire | Inner) -> list[Action]:
        """Takes what happened and says what is to be done, in order."""
        match event:
            case Opened():
                return list(self._open(event))
            case Refused(room, why):
                return list(self._refuse(room, why))
            case Joined(peer):
                self.peers.add(peer)
            case Heard(peer, Reserve() as reserve) if peer in self.peers:
                return list(self._reserve(peer, reserve))
            case Heard(peer, Over() as over) if peer in self.peers:
                return list(self._over(peer, over))
            case Ticketed(key):
                self._ticketed(self.keys[key], event)
            case Computed(key) if key in self.keys:
                self._computed(self.keys[key])
            case Noted(key) if key in self.keys:
                return list(self._noted(self.keys[key], event))
            case Written():
                return list(self._written(event))
            case Cancelled(key, why):
                return list(self._fail(self.keys[key], why)) if key in self.keys else []
            case Gone(peer, reason):
                return list(self._gone(peer, reason))
            case Clock(now):
                return list(self._clock(now))
        return []

    # -- the two halves of a pair ----------------------------------------------------------------------------------

    def _open(self, opened: Opened) -> Iterator[Action]:
        key, number = opened.key, opened.room
        room = self.rooms.get(number)
        if room is not None and room.stage == UNWANTED:
            self._forget(room)
            yield End(key, room.why)
            yield Free(key)
            return
        if room is not None and room.stage not in (OFFERED, REFUSED):
            yield End(key, Why(f"bootstrap_room {number} is in use; every request needs one of its own", "request"))
            yield Free(key)
            return
        if room is None or room.stage == REFUSED:
            room = self.rooms[number] = Giving(number, EXPECTED)
            self._wait(room, self.config.bootstrap_s)
        room.key, room.prompt, room.awaits, room.marks = key, opened.prompt, opened.awaits, [self.now]
        self.keys[key] = room
        if room.reserve is not None:
            yield from self._pair(room)

    def _refuse(self, number: int, why: Why) -> Iterator[Action]:
        room = self.rooms.get(number)
        if room is None:
            self._keep(number, REFUSED, why)
        elif room.stage == UNWANTED:
            self._forget(room)
        elif room.stage == OFFERED:
            yield from self._close(room, why)

    def _keep(self, number: int, stage: str, why: Why) -> None:
        """The other half of the pair, when it comes, is told."""
        room = self.rooms[number] = Giving(number, stage)
        room.why = why
        self._wait(room, min(self.config.bootstrap_s, self.config.keep_s))

    def _reserve(self, peer: str, reserve: Reserve) -> Iterator[Action]:
        generation = reserve.generation
        floor = self.floors[peer] = max(self.floors.get(peer, 0), reserve.floor)
        closed = self.closed.setdefault(peer, {})
        for old in [g for g in closed if g < floor]:
            del closed[old]
        if generation < floor or (peer, generation) in self.routes:
            return
        if generation in closed:
            if (why := closed[generation]) is not None:
                yield Tell(peer, Closed(generation, why))
            return
        room = self.rooms.get(reserve.room)
        if room is not None and room.stage == UNWANTED:
            self._forget(room)
            room = None
        if room is not None and room.stage not in (EXPECTED, REFUSED):
            why = Why(f"bootstrap_room {reserve.room} is in use by another request; every one needs its own", "request")
            closed[generation] = why
            yield Tell(peer, Closed(generation, why))
            return
        if room is None:
            room = self.rooms[reserve.room] = Giving(reserve.room, OFFERED)
            self._wait(room, self.config.bootstrap_s)
        room.peer, room.reserve = peer, reserve
        self.routes[peer, generation] = room
        if room.stage == EXPECTED:
            yield from self._pair(room)
        elif room.stage == REFUSED:
            yield from self._close(room, room.why)

    def _pair(self, room: Giving) -> Iterator[Action]:
        assert room.reserve is not None
        assert room.prompt is not None
        if room.prompt == room.reserve.prompt:
            room.stage, room.deadline = SENDING, inf  # writers tell how it went, or their peer goes
            room.marks.append(self.now)
            yield Start(room.key, room.peer, room.reserve)
            return
        text = f"prefill has {room.prompt}, decode {room.reserve.prompt}. Send both the same request"
        why = Why(f"the two servers were sent different prompts for room {room.room}: {text}", "request")
        yield from self._fail(room, why)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _ticketed(self, room: Giving, planned: Ticketed) -> None:
        assert room.stage == SENDING
        room.tickets[planned.ticket] = set()
        room.last, room.num_cached = planned.last, planned.num_cached
        if len(room.marks) == NUM_BEFORE:
            room.marks.append(self.now)
        self.tickets[planned.ticket] = room

    def _computed(self, room: Giving) -> None:
        """Ranks may have told before that all of it is written: then it took no time."""
        if room.stage == SENDING and len(room.marks) == NUM_BEFORE + 1:
            room.marks.append(self.now)

    def _written(self, written: Written) -> Iterator[Action]:
        room = self.tickets.get(written.ticket)
        if room is None:
            return
        room.num_bytes += written.num_bytes
        through = room.tickets[written.ticket]
        through.add(written.rank)
        room.slowest = max(room.slowest, written.seconds)
        if len(through) == self.config.num_writers:
            del room.tickets[written.ticket], self.tickets[written.ticket]
            room.writing, room.slowest = room.writing + room.slowest, 0.0
        if written.error is not None and room.stage == SENDING:
            yield from self._fail(room, Why(f"the prompt could not be written to the decode server: {written.error}"))
        elif not room.tickets and room.stage == STOPPING:
            yield from self._stopped(room)
        else:
            yield from self._send(room)

    def _noted(self, room: Giving, noted: Noted) -> Iterator[Action]:
        room.scores, room.first, room.awaits = noted.scores, noted.first, False
        yield from self._send(room)

    def _send(self, room: Giving) -> Iterator[Action]:
        """The record goes once all has landed and is told. Ranks may say the one before the other."""
        if room.stage != SENDING or not room.last or room.tickets or room.awaits:
            return
        assert room.reserve is not None
        generation = room.reserve.generation
        if room.peer in self.peers:
            self.closed.setdefault(room.peer, {})[generation] = None
        room.stage = TOLD
        self._wait(room, self.config.reply_s)
        yield Free(room.key)
        room.marks += [self.now] * (NUM_MARKS - len(room.marks))
        record = Sent(generation, room.reserve.prompt, times_of(room), room.scores, room.num_cached, room.first)
        yield Tell(room.peer, record)

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _over(self, peer: str, over: Over) -> Iterator[Action]:
        room = self.routes.get((peer, over.generation))
        if room is not None and room.stage == STOPPING:
            return  # told when its writes are over
        if over.why is None:
            if room is not None and room.stage == TOLD:
                self._forget(room)
                yield End(room.key, None, times_of(room))
            return
        if room is None or room.stage == TOLD:
            # Whatever there was is over. What is still on its way to here must not begin anything.
            if over.generation >= self.floors.get(peer, 0):
                self.closed.setdefault(peer, {})[over.generation] = over.why
            yield Tell(peer, Closed(over.generation, over.why))
        if room is not None:
            yield from self._fail(room, over.why)
        elif (half := self.rooms.get(over.room)) is None:
            self._keep(over.room, UNWANTED, over.why)
        elif half.stage == EXPECTED:
            yield from self._fail(half, over.why)

    def _fail(self, room: Giving, why: Why) -> Iterator[Action]:
        """Ends a room before its time; decode is told when nothing is under way any more."""
        room.why = why
        if room.key >= 0:
            yield End(room.key, why)
        if room.stage == TOLD:
            self._forget(room)
        elif room.stage == EXPECTED and room.reserve is None:
            self._forget(room)
            self._keep(room.room, REFUSED, why)
            yield Free(room.key)
        elif room.stage == SENDING:
            room.stage = STOPPING
            self.stopping.append(room)
            self._unlist(room)
            if not room.tickets:
                yield from self._stopped(room)
        else:
            if room.key >= 0:
                yield Free(room.key)
            yield from self._close(room, why)

    def _stopped(self, room: Giving) -> Iterator[Action]:
        self.stopping.remove(room)
        yield Free(room.key)
        yield from self._close(room, room.why)

    def _close(self, room: Giving, why: Why) -> Iterator[Action]:
        """Decode hears that nothing is, or will be, under way for its generation."""
        self._forget(room)
        if room.reserve is not None and room.peer in self.peers:
            self.closed.setdefault(room.peer, {})[room.reserve.generation] = why
            yield Tell(room.peer, Closed(room.reserve.generation, why))

    def _unlist(self, room: Giving) -> None:
        if self.rooms.get(room.room) is room:
            del self.rooms[room.room]
        self.keys.pop(room.key, None)

    def _forget(self, room: Giving) -> None:
        self._unlist(room)
        if room.reserve is not None:
            self.routes.pop((room.peer, room.reserve.generation), None)

    def _gone(self, peer: str, reason: str) -> Iterator[Action]:
        self.peers.discard(peer)
        self.floors.pop(peer, None)
        self.closed.pop(peer, None)
        why = Why(f"the decode server has gone: {reason}")
        for room in [room for (name, _), room in self.routes.items() if name == peer]:
            if room.stage == STOPPING:
                continue
            yield from self._fail(room, why)

    def _late(self, room: Giving) -> Iterator[Action]:
        if room.stage in (REFUSED, UNWANTED):
            self._forget(room)
        elif room.stage == OFFERED:
            why = Why(f"no request came to the prefill server for room {room.room} in {self.config.bootstrap_s:g} s")
            yield from self._close(room, why)
        elif room.stage == EXPECTED:
            why = Why(f"no decode server asked for room {room.room} in {self.config.bootstrap_s:g} s")
            yield from self._fail(room, why)
        else:
            yield from self._fail(room, Why(f"the decode server has not confirmed in {self.config.reply_s:g} s"))
