"""How a rank can be reached by ranks of other servers: what of it goes into the server's manifest."""

from __future__ import annotations

import msgspec

from tessera.transfer.manifest import Member


class Seat(msgspec.Struct, frozen=True):
    """A rank's entry in the manifest, and the name of its transfer engine, by which it is fenced."""

    member: Member
    name: str
