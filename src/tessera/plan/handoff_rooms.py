"""What the machines of both sides have in common: the time, and rooms, each of which waits until a deadline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import inf
from typing import Generic, Protocol, TypeVar

from tessera.plan.handoff import Action, HandoffConfig


class Room(Protocol):
    """`deadline`: when it has waited too long; `inf` while nothing limits what it waits for."""

    deadline: float


R = TypeVar("R", bound=Room)


class Rooms(ABC, Generic[R]):
    """Rooms by number (giver) or key (taker)."""

    def __init__(self, config: HandoffConfig) -> None:
        self.config = config
        self.now = 0.0
        self.rooms: dict[int, R] = {}
        self._due = inf  # no deadline is before it

    def _wait(self, room: R, seconds: float, until: float = inf) -> None:
        """For so long, and not beyond `until`."""
        room.deadline = min(self.now + seconds, until)
        self._due = min(self._due, room.deadline)

    def _clock(self, now: float) -> Iterator[Action]:
        self.now = now
        if now < self._due:
            return
        for number, room in list(self.rooms.items()):
            if self.rooms.get(number) is room and now >= room.deadline:
                yield from self._late(room)
        self._due = min((room.deadline for room in self.rooms.values()), default=inf)

    @abstractmethod
    def _late(self, room: R) -> Iterator[Action]:
        """A room's deadline has come."""
