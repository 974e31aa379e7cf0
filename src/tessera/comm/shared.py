"""Collectives among CPU ranks of one host, through memory that they share.

A rank posts its parts as a message to its group and reads those of the others when it waits, in the order of ranks, so
that all get the same bits. Per group the messages are numbered; DEPTH of a rank may be under way. Before a rank reuses
a place it finishes its own collective of that number, then waits until the others have: all ranks call the same
collectives in the same order, so the one that is furthest behind can always go on.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Dtype, Handle
from tessera.comm.brought import Combine, joined, picked, summed
from tessera.comm.futex import Counter, check_platform
from tessera.comm.meet import Meeting
from tessera.comm.segment import DEPTH, KIND_BYTES, Message, Ranks, Segment
from tessera.core.errors import DeadlineError, PeerError
from tessera.core.mesh import Mesh

_LOOK_S = 0.05  # how often a waiter looks whether the one it waits for is alive
KINDS = ("sum", "gather", "scatter_sum", "exchange")


class Liveness:
    """Tells whether the other ranks are there: processes that run, and have not left."""

    def __init__(self, segment: Segment, pids: Sequence[int]) -> None:
        self._segment = segment
        self._ends = [os.pidfd_open(pid) for pid in pids]

    def gone(self, rank: int) -> str | None:
        """Why a rank will post nothing more; None while it may."""
        if self._segment.has_left(rank):
            return "has left"
        ended = select.poll()
        ended.register(self._ends[rank], select.POLLIN)
        return "has ended" if ended.poll(0) else None

    def close(self) -> None:
        """Forgets them."""
        while self._ends:
            os.close(self._ends.pop())


@dataclass(eq=False, slots=True)
class _Collective:
    """One under way."""

    channel: _Channel
    number: int
    what: str
    combine: Combine
    value: Tensor | None = None

    def wait(self) -> Tensor:
        """The result."""
        self.channel.finish(self.number)
        assert self.value is not None
        return self.value


class _Channel:
    """The messages of one group, as one member sees them."""

    def __init__(self, segment: Segment, liveness: Liveness, ranks: Ranks, rank: int, deadline_s: float) -> None:
        self._segment, self._liveness, self._ranks, self._deadline_s = segment, liveness, ranks, deadline_s
        self._slots = [segment.plan.groups[ranks] + i for i in range(len(ranks))]
        self._me = ranks.index(rank)
        counters = [segment.counters(slot) for slot in self._slots]
        self._posted = [posted for posted, _ in counters]
        self._taken = [taken for _, taken in counters]
        self._count = 0
        self._pending: deque[_Collective] = deque()

    def post(self, kind: str, axis: str, parts: Sequence[Tensor], combine: Combine, note: Sequence[int] = ()) -> Handle:
        """Brings this member's parts to the next collective."""
        collective = _Collective(self, self._count, f"{kind} over '{axis}'", combine)
        self.finish(self._count - DEPTH)
        self._await(self._taken, self._count - DEPTH + 1, collective.what)
        self._segment.write(self._slots[self._me], self._count % DEPTH, KINDS.index(kind), parts, note)
        self._pending.append(collective)
        self._count += 1
        self._posted[self._me].set(self._count)
        return collective

    def finish(self, number: int) -> None:
        """Takes part in all collectives up to `number`."""
        while self._pending and self._pending[0].number <= number:
            collective = self._pending[0]
            self._await(self._posted, collective.number + 1, collective.what)
            messages = [self._segment.read(slot, collective.number % DEPTH) for slot in self._slots]
            kinds = {message.head[:KIND_BYTES] for message in messages}
            assert len(kinds) == 1, f"ranks {self._ranks} met in different collectives, here a {collective.what}"
            collective.value = collective.combine([_pieces(message) for message in messages])
            self._pending.popleft()
            self._taken[self._me].set(collective.number + 1)

    def _await(self, counters: list[Counter], count: int, what: str) -> None:
        """Until all `counters` have reached `count`."""
        until = time.monotonic() + self._deadline_s
        for member, counter in enumerate(counters):
            if member == self._me or counter.reached(count):
                continue
            while not counter.wait(count, _LOOK_S):
                gone = self._liveness.gone(self._ranks[member])
                if counter.reached(count):  # it may have come and then gone
                    break
                if gone:
                    raise PeerError(f"rank {self._ranks[self._me]} in {what}: rank {self._ranks[member]} {gone}")
                if time.monotonic() > until:
                    late = [r for r, c in zip(self._ranks, counters, strict=True) if not c.reached(count)]
                    waited = f"rank {self._ranks[self._me]} waited {self._deadline_s} s in {what}"
                    raise DeadlineError(f"{waited} for ranks {[r for r in late if r != self._ranks[self._me]]}")


class SharedComm:
    """The `Comm` of one rank. Results do not share memory with anybody."""

    def __init__(self, meeting: Meeting, deadline_s: float) -> None:
        check_platform()
        self.mesh: Mesh = meeting.mesh
        self.rank: int = meeting.rank
        self._segment = _map(meeting)
        self._liveness = Liveness(self._segment, [card.pid for card in meeting.cards])
        groups = {axis.name: self.mesh.group(self.rank, axis.name) for axis in self.mesh.axes}
        shared = {ranks for ranks in groups.values() if len(ranks) > 1}
        channels = {r: _Channel(self._segment, self._liveness, r, self.rank, deadline_s) for r in shared}
        self._channels = {axis: channels.get(ranks) for axis, ranks in groups.items()}
        self._alone = Alone(self.mesh, self.rank)

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """See `Comm.sum`."""
        if (channel := self._channels.get(axis)) is None:
            return self._alone.sum(parts, axis, dtype)
        return channel.post("sum", axis, parts, partial(summed, dtype=dtype))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """See `Comm.gather`."""
        if (channel := self._channels.get(axis)) is None:
            return self._alone.gather(part, axis, dim, lengths)
        at = self.mesh.coordinate(self.rank, axis)
        assert lengths is None or part.shape[dim] == lengths[at], f"{part.shape[dim]} elements, {lengths} announced"
        return channel.post("gather", axis, [part], partial(joined, dim=dim))

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """See `Comm.scatter_sum`."""
        if (channel := self._channels.get(axis)) is None:
            return self._alone.scatter_sum(parts, axis, dim, lengths, dtype)
        at = self.mesh.coordinate(self.rank, axis)
        assert parts[0].shape[dim] == sum(lengths), f"{parts[0].shape[dim]} elements to cut into {lengths}"
        keep = (dim, sum(lengths[:at]), lengths[at])
        return channel.post("scatter_sum", axis, parts, partial(summed, keep=keep, dtype=dtype))

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """See `Comm.exchange`. The note of a message says how it is cut."""
        if (channel := self._channels.get(axis)) is None:
            return self._alone.exchange(part, axis, sent, received)
        assert len(part) == sum(sent), f"{len(part)} rows to cut into {sent}"
        mine = partial(picked, at=self.mesh.coordinate(self.rank, axis), received=received)
        return channel.post("exchange", axis, [part], mine, sent)

    def forget(self) -> None:
        """See `Comm.forget`. Nothing is recorded here."""

    def fault(self) -> None:
        """See `Comm.fault`. It raises at once."""

    def close(self) -> None:
        """See `Comm.close`."""
        self._segment.leave(self.rank)
        self._liveness.close()


def _map(meeting: Meeting) -> Segment:
    """The segment, mapped by all ranks when this returns."""
    if meeting.rank == 0:
        segment = Segment.create(meeting.mesh)
        meeting.say("segment", f"{segment.nonce.hex()} {segment.path}")
    else:
        nonce, _, path = meeting.ask("segment").partition(" ")
        segment = Segment.attach(meeting.mesh, meeting.rank, path, bytes.fromhex(nonce))
    meeting.all_at("mapped")
    segment.seal()
    return segment


def _pieces(message: Message) -> Sequence[Tensor]:
    """What a member brought; of an exchange cut as the note says."""
    return message.parts[0].split(list(message.note)) if message.note else message.parts
