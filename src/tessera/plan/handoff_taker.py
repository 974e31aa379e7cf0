"""The decode side of every room; see `handoff.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import msgspec

from tessera.core.messages import Address, HandoverTimes
from tessera.plan.handoff import (
    ABORTED,
    Action,
    Arrive,
    Cancelled,
    Closed,
    End,
    Fence,
    Fenced,
    Free,
    Gone,
    HandoffConfig,
    Heard,
    Inner,
    Leased,
    Meet,
    Met,
    Opened,
    Over,
    Prompt,
    Refused,
    Reserve,
    Sent,
    Tell,
    Unmet,
    Want,
    Why,
    Wire,
)
from tessera.plan.handoff_rooms import Rooms
from tessera.plan.step import Clock

# Stages of a room, in order. From `ASKED` on a writer may know of its pages.
MEETING, WANTING, ASKED, LEAVING = "meeting", "wanting", "asked", "leaving"
WAITED_FOR = {
    MEETING: "prefill server {address} to answer",
    WANTING: "free pages and a slot",
    ASKED: "the prompt from prefill server {address}",
}


@dataclass(slots=True)
class Taking:
    """A room at decode. `deadline` is that of its stage; while it is `LEAVING`, `Over` is said again then, until
    `until`."""

    key: int
    room: int
    prompt: Prompt
    address: Address
    seed: int
    began: float
    deadline: float = inf
    stage: str = MEETING
    met: float = 0.0
    asked: float = 0.0
    peer: str = ""
    until: float = inf


class Taker(Rooms[Taking]):
    """All rooms of a decode server. Their keys are their generations."""

    def __init__(self, config: HandoffConfig) -> None:
        super().__init__(config)
        self.peers: dict[Address, str] = {}
        self.meeting: set[Address] = set()
        self.unsaid: dict[Address, list[Over]] = {}  # of rooms that ended, for when the server is met
        self.fencing: dict[str, tuple[Address, set[int]]] = {}  # and the ranks that have not fenced it yet

    @property
    def idle(self) -> bool:
        """No memory is waiting for a writer, and nobody for an answer."""
        return not self.rooms and not self.fencing

    def apply(self, event: Wire | Inner) -> list[Action]:
        """Takes what happened and says what is to be done, in order."""
        match event:
            case Opened():
                return list(self._open(event))
            case Met(address, peer):
                return list(self._met(address, peer))
            case Unmet(address, why, peer):
                return list(self._unmet(address, why, peer))
            case Refused():
                return list(self._refuse(event))
            case Leased():
                return list(self._leased(event))
            case Heard(peer, (Sent() | Closed()) as letter):
                return list(self._heard(peer, letter))
            case Cancelled(key, why):
                return list(self._cancel(self.rooms[key], why)) if key in self.rooms else []
            case Gone(peer, reason):
                return list(self._gone(peer, reason))
            case Fenced(peer, rank):
                return list(self._fenced(peer, rank))
            case Clock(now):
                return list(self._clock(now))
        return []

    # -- until it is asked for -------------------------------------------------------------------------------------

    def _open(self, opened: Opened) -> Iterator[Action]:
        key, address = opened.key, opened.address
        assert address is not None
        room = self.rooms[key] = Taking(key, opened.room, opened.prompt, address, opened.seed, self.now)
        self._wait(room, self.config.meet_s)
        if address in self.peers:
            yield from self._want(room)
        else:
            yield from self._meet(address)

    def _refuse(self, refused: Refused) -> Iterator[Action]:
        """Prefill is told, though it has to be met for that."""
        assert refused.address is not None
        over = Over(refused.key, refused.room, refused.why)
        if (peer := self.peers.get(refused.address)) is not None:
            yield Tell(peer, over)
        else:
            self.unsaid.setdefault(refused.address, []).append(over)
            yield from self._meet(refused.address)

    def _meet(self, address: Address) -> Iterator[Action]:
        """Not while its last session is being fenced: to connect anew lifts the fence."""
        if address not in self.meeting and all(address != at for at, _ in self.fencing.values()):
            self.meeting.add(address)
            yield Meet(address)

    def _met(self, address: Address, peer: str) -> Iterator[Action]:
        self.meeting.discard(address)
        self.peers[address] = peer
        for over in self.unsaid.pop(address, ()):
            yield Tell(peer, over)
        for room in self._at(address, MEETING):
            yield from self._want(room)

    def _unmet(self, address: Address, why: Why, peer: str) -> Iterator[Action]:
        """Rooms that wait for it end, and those of prefill with them, where `peer` can be told."""
        for room in self._at(address, MEETING):
            yield from self._cancel(room, why)
        self.meeting.discard(address)
        unsaid = self.unsaid.pop(address, [])
        if peer:
            for over in unsaid:
                yield Tell(peer, over)
            yield Fence(peer)

    def _at(self, address: Address, stage: str) -> list[Taking]:
        return [room for room in self.rooms.values() if room.address == address and room.stage == stage]

    def _want(self, room: Taking) -> Iterator[Action]:
        room.stage, room.peer, room.met = WANTING, self.peers[room.address], self.now
        self._wait(room, self.config.waiting_s)
        yield Want(room.key)

    def _leased(self, leased: Leased) -> Iterator[Action]:
        room = self.rooms[leased.key]
        room.stage, room.asked = ASKED, self.now
        self._wait(room, self.config.waiting_s)
        floor = min(self.rooms)
        yield Tell(
            room.peer,
            Reserve(room.room, room.key, floor, room.prompt, leased.dp_rank, leased.pages, leased.slot, room.seed),
        )

    # -- how it ends -----------------------------------------------------------------------------------------------

    def _heard(self, peer: str, letter: Sent | Closed) -> Iterator[Action]:
        room = self.rooms.get(letter.generation)
        if room is None or room.peer != peer or room.stage not in (ASKED, LEAVING):
            return  # of another time
        del self.rooms[room.key]
        if room.stage == LEAVING:
            yield Free(room.key)
        elif isinstance(letter, Closed):
            yield Free(room.key)
            yield End(room.key, letter.why)
        elif letter.prompt != room.prompt:
            why = Why(
                f"the two servers were sent different prompts for room {room.room}: prefill has {letter.prompt}, "
                f"decode {room.prompt}. Send both the same request",
                "request",
            )
            yield Free(room.key)
            yield End(room.key, why)
            yield Tell(peer, Over(room.key, room.room, why))
        else:
            times = msgspec.structs.replace(
                letter.times or HandoverTimes(0.0, 0.0, 0.0, 0.0),
                meeting=room.met - room.began,
                queue=room.asked - room.met,
                waiting=self.now - room.asked,
                ended=self.now,
            )
            yield Arrive(room.key, times, letter.scores, letter.num_cached, letter.first)
            yield Tell(peer, Over(room.key, room.room))

    def _cancel(self, room: Taking, why: Why) -> Iterator[Action]:
        """Ends a room before its time. What a writer may know of stays until the writer says that it is through."""
        if room.stage == LEAVING:
            return
        yield End(room.key, why)
        if room.stage != ASKED:
            del self.rooms[room.key]
            yield Free(room.key)
            over = Over(room.key, room.room, why)
            if room.stage == WANTING and room.peer in self.peers.values():
                yield Tell(room.peer, over)
            elif room.stage == MEETING:
                self.unsaid.setdefault(room.address, []).append(over)
            return
        room.stage, room.until = LEAVING, self.now + self.config.reply_s
        yield from self._over(room, why)

    def _over(self, room: Taking, why: Why) -> Iterator[Action]:
        self._wait(room, self.config.retry_s, room.until)
        yield Tell(room.peer, Over(room.key, room.room, why))

    def _late(self, room: Taking) -> Iterator[Action]:
        if room.stage != LEAVING:
            waited = self.config.meet_s if room.stage == MEETING else self.config.waiting_s
            what = WAITED_FOR[room.stage].format(address=room.address)
            yield from self._cancel(room, Why(f"waited {waited:g} s for {what}; nothing came"))
        elif self.now < room.until:
            yield from self._over(room, ABORTED)
        else:
            reason = f"it has not said for {self.config.reply_s:g} s that it has stopped writing"
            yield from self._gone(room.peer, reason)

    def _gone(self, peer: str, reason: str) -> Iterator[Action]:
        """All that was agreed with a peer is void. Its pages are free when no rank can be written by it any more."""
        address = next((at for at, name in self.peers.items() if name == peer), None)
        if address is None:
            return
        del self.peers[address]
        self.fencing[peer] = (address, set(range(self.config.num_ranks)))
        for room in [room for room in self.rooms.values() if room.peer == peer]:
            why = Why(f"prefill server {address} has gone: {reason}")
            if room.stage != LEAVING:
                yield End(room.key, why)
            if room.stage in (ASKED, LEAVING):
                room.stage, room.deadline = LEAVING, inf  # until every rank has fenced the peer
            else:
                del self.rooms[room.key]
                yield Free(room.key)
                self.unsaid.setdefault(address, []).append(Over(room.key, room.room, why))  # if it lives after all
        yield Fence(peer)

    def _fenced(self, peer: str, rank: int) -> Iterator[Action]:
        if peer not in self.fencing:
            return
        address, missing = self.fencing[peer]
        missing.discard(rank)
        if missing:
            return
        del self.fencing[peer]
        for room in [room for room in self.rooms.values() if room.peer == peer]:
            del self.rooms[room.key]
            yield Free(room.key)
        if self._at(address, MEETING) or address in self.unsaid:
            yield from self._meet(address)
