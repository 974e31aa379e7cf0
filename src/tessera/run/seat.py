"""How a rank can be reached by ranks of other servers: what of it goes into the server's manifest."""

from __future__ import annotations

from typing import Protocol

import msgspec

from tessera.run.poster import Order
from tessera.transfer.manifest import Member


class Seat(msgspec.Struct, frozen=True):
    """A rank's entry in the manifest, and the name of its transfer engine, by which it is fenced."""

    member: Member
    name: str


class Reachable(Protocol):
    """What hand-overs need of an instance, be it one runner or many processes."""

    @property
    def seats(self) -> list[Seat]:
        """Of all ranks, in order; empty where nothing is handed over."""

    def order(self, order: Order) -> None:
        """Gives an order to all ranks. What comes of it is told by the function that the instance was built with."""
