"""Collectives between ranks that are threads of one process: for tests, and the reference of the others.

Ranks meet at a numbered rendezvous per group. Sums run in the order of ranks on every rank, so all get the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tessera.comm.base import Dtype, Handle
from tessera.comm.brought import Brought, Combine, joined, picked, summed
from tessera.core.errors import DeadlineError, PeerError
from tessera.core.mesh import Mesh

Key = tuple[tuple[int, ...], int]


@dataclass
class _Meeting:
    """What the ranks of a group brought to one collective: its kind, and the tensors by rank."""

    kind: str
    brought: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    taken: int = 0


class LocalGroup:
    """The place where the threads of one mesh meet. `deadline_s`: how long a rank waits for the others."""

    def __init__(self, mesh: Mesh, deadline_s: float = 30.0) -> None:
        self.mesh = mesh
        self.deadline_s = deadline_s
        self._changed = threading.Condition()
        self._meetings: dict[Key, _Meeting] = {}
        self._joined: set[int] = set()
        self._failed: tuple[int, BaseException | None] | None = None

    def join(self, rank: int, seconds: float) -> LocalComm:
        """The collectives of one rank once all have joined. Raises DeadlineError naming those that did not."""
        with self._changed:
            self._joined.add(rank)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: len(self._joined) == self.mesh.size, seconds):
                missing = sorted(set(range(self.mesh.size)) - self._joined)
                raise DeadlineError(f"of {self.mesh.size} ranks these did not join within {seconds} s: {missing}")
        return self.comm(rank)

    def comm(self, rank: int) -> LocalComm:
        """The collectives of one rank, for the thread that runs it."""
        return LocalComm(self, rank)

    def fail(self, rank: int, error: BaseException | None) -> None:
        """Rank `rank` ends, with `error` if something broke: all who wait, or will, get a `PeerError`."""
        with self._changed:
            self._failed = self._failed or (rank, error)
            self._changed.notify_all()

    def check(self) -> None:
        """Raises AssertionError when a collective was begun and not ended by all of its ranks."""
        with self._changed:
            assert not self._meetings, f"collectives under way: {sorted(self._meetings)}"

    def bring(self, key: Key, rank: int, kind: str, parts: tuple[Tensor, ...]) -> None:
        """Deposits the parts of `rank`."""
        with self._changed:
            meeting = self._meetings.setdefault(key, _Meeting(kind))
            assert meeting.kind == kind, f"rank {rank} called {kind} where the others called {meeting.kind}"
            meeting.brought[rank] = parts
            self._changed.notify_all()

    def take(self, key: Key, rank: int) -> Brought:
        """The parts of all ranks of the group, in order of rank; waits for them."""
        ranks = key[0]
        with self._changed:
            meeting = self._meetings[key]
            if not self._changed.wait_for(lambda: self._failed or len(meeting.brought) == len(ranks), self.deadline_s):
                missing = sorted(set(ranks) - set(meeting.brought))
                raise DeadlineError(f"rank {rank} waited {self.deadline_s} s in {meeting.kind} for ranks {missing}")
            if len(meeting.brought) < len(ranks) and self._failed:
                raise PeerError(f"rank {rank} in {meeting.kind}: rank {self._failed[0]} has left") from self._failed[1]
            meeting.taken += 1
            if meeting.taken == len(ranks):
                del self._meetings[key]
            return [meeting.brought[r] for r in ranks]


@dataclass
class _Collective:
    """One under way: `combine` makes the result of what all brought, in order of rank, when it is waited for."""

    group: LocalGroup
    key: Key
    rank: int
    combine: Combine

    def wait(self) -> Tensor:
        """The result."""
        return self.combine(self.group.take(self.key, self.rank))


class LocalComm:
    """The `Comm` of one thread. What a rank brings must not change until all have waited."""

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.group = group
        self.mesh = group.mesh
        self.rank = rank
        self._counts: dict[tuple[int, ...], int] = {}

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """See `Comm.sum`. The parts are spoilt, so that tests see who still uses what was given away."""
        brought = tuple(part.clone() for part in parts)
        for part in parts:
            part.fill_(torch.nan)
        return self._start(axis, "sum", brought, partial(summed, dtype=dtype))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """See `Comm.gather`."""
        at = self.mesh.coordinate(self.rank, axis)
        assert lengths is None or part.shape[dim] == lengths[at], f"{part.shape[dim]} elements, {lengths} announced"
        return self._start(axis, "gather", (part,), partial(joined, dim=dim))

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """See `Comm.scatter_sum`."""
        at = self.mesh.coordinate(self.rank, axis)
        keep = (dim, sum(lengths[:at]), lengths[at])
        return self._start(axis, "scatter_sum", tuple(parts), partial(summed, keep=keep, dtype=dtype))

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """See `Comm.exchange`."""
        mine = partial(picked, at=self.mesh.coordinate(self.rank, axis), received=received)
        return self._start(axis, "exchange", part.split(list(sent)), mine)

    def forget(self) -> None:
        """See `Comm.forget`. Nothing is recorded here."""

    def fault(self) -> None:
        """See `Comm.fault`. It raises at once."""

    def close(self) -> None:
        """See `Comm.close`."""
        self.group.fail(self.rank, None)

    def _start(self, axis: str, kind: str, parts: tuple[Tensor, ...], combine: Combine) -> Handle:
        return _Collective(self.group, self._bring(axis, kind, parts), self.rank, combine)

    def _bring(self, axis: str, kind: str, parts: tuple[Tensor, ...]) -> Key:
        ranks = self.mesh.group(self.rank, axis)
        count = self._counts.get(ranks, 0)
        self._counts[ranks] = count + 1
        self.group.bring((ranks, count), self.rank, f"{kind} over '{axis}'", parts)
        return ranks, count
