"""One piece of memory that all ranks of a host map: for each group and rank, counters and places for messages.

    page 0          nonce, then for each rank whether it has left
    page 1 ..       for each group and member, on cache lines of their own: messages posted, messages taken
    then            for each group, member and turn of DEPTH: a header, a note and the tensors of one message

The memory has no name (memfd_create), so it ends with its last process, whatever that dies of. It is sparse: a place
may hold MESSAGE_BYTES, but only what was once written takes memory; at most DEPTH times the largest message a member.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.comm.futex import Counter
from tessera.core.errors import CapacityError, ConfigError, Conflict
from tessera.core.mesh import Mesh

DEPTH = 4  # messages a member may have under way in one group
MESSAGE_BYTES = 1 << 28
_LINE, _PAGE = 64, 4096
_DIMS, MEMBERS = 11, 32
# Kind, dtype, number of parts, length of the note, dims, sizes; then the note. Tensors behind them lie aligned.
_HEADER, _NOTE = struct.Struct(f"<{5 + _DIMS}q"), struct.Struct(f"<{MEMBERS}q")
_DATA = _HEADER.size + _NOTE.size
KIND_BYTES, NOTED = 8, 24  # of a header: the bytes of the kind, and the byte that counts the note
_NONCE_BYTES = 16

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Where everything lies; the same on all ranks, since it follows from the mesh."""

    groups: dict[Ranks, int]  # the slot of a group's first member: slots number the members of all groups
    slots: int
    messages: int  # offset of the first

    @property
    def size(self) -> int:
        """Bytes of the segment, nearly all of them never touched."""
        return self.message(self.slots, 0)

    def counters(self, slot: int) -> int:
        """Offset of the two counters of a member."""
        return _PAGE + 2 * _LINE * slot

    def message(self, slot: int, turn: int) -> int:
        """Offset of a message of a member."""
        return self.messages + (slot * DEPTH + turn) * MESSAGE_BYTES


def plan(mesh: Mesh) -> Plan:
    """The groups of two or more ranks of every axis, each once."""
    groups, slots = {}, 0
    for ranks in sorted({mesh.group(r, axis.name) for r in range(mesh.size) for axis in mesh.axes}):
        if len(ranks) > MEMBERS:
            found = f"at most {MEMBERS} ranks share memory, not {len(ranks)}"
            raise ConfigError([Conflict(("shared-memory collectives",), found, "Use gloo")])
        if len(ranks) > 1:
            groups[ranks] = slots
            slots += len(ranks)
    counters = _PAGE + 2 * _LINE * slots
    return Plan(groups, slots, -(-counters // _PAGE) * _PAGE)


class Message(NamedTuple):
    """What a member brought. The parts are views: the next message of that turn writes over them."""

    head: bytes
    parts: list[Tensor]
    note: tuple[int, ...]


class Segment:
    """The mapped memory. `create` makes it and `path` tells the others where; `attach` maps it there."""

    def __init__(self, mesh: Mesh, file: int) -> None:
        self.plan = plan(mesh)
        self._memory = mmap.mmap(file, self.plan.size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._views = lru_cache(4096)(self._make_views)
        self._file = file

    @classmethod
    def create(cls, mesh: Mesh) -> Segment:
        """New memory, all zeros but for a nonce."""
        file = os.memfd_create("tessera")
        os.ftruncate(file, plan(mesh).size)
        segment = cls(mesh, file)
        segment._memory[:_NONCE_BYTES] = secrets.token_bytes(_NONCE_BYTES)
        return segment

    @classmethod
    def attach(cls, mesh: Mesh, rank: int, path: str, nonce: bytes) -> Segment:
        """Maps the memory of rank 0. Raises ConfigError where that cannot be reached."""
        try:
            file = os.open(path, os.O_RDWR)
            if os.pread(file, _NONCE_BYTES, 0) == nonce:
                return cls(mesh, file)
            found = "other memory is found"
            os.close(file)
        except OSError as error:
            found = str(error)
        reason = f"the memory of rank 0 cannot be mapped ({found}): is it on another host, or in another container?"
        raise ConfigError([Conflict(("shared-memory collectives", f"rank {rank}"), reason, "Use gloo")])

    @property
    def path(self) -> str:
        """Where processes of this host find the memory until `seal`."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @property
    def nonce(self) -> bytes:
        """Tells this memory from any other."""
        return self._memory[:_NONCE_BYTES]

    def seal(self) -> None:
        """All have mapped it: it needs no descriptor any more."""
        os.close(self._file)

    def leave(self, rank: int) -> None:
        """Marks a rank as gone."""
        self._memory[_NONCE_BYTES + rank] = 1

    def has_left(self, rank: int) -> bool:
        """Whether it is marked."""
        return self._memory[_NONCE_BYTES + rank] == 1

    def counters(self, slot: int) -> tuple[Counter, Counter]:
        """Messages that a member has posted, and how many of each other member it has taken."""
        offset = self.plan.counters(slot)
        return Counter(self._memory, offset), Counter(self._memory, offset + _LINE)

    def write(self, slot: int, turn: int, kind: int, parts: Sequence[Tensor], note: Sequence[int] = ()) -> None:
        """Puts down the parts, all of one shape and dtype, and a note of up to MEMBERS numbers, as one message."""
        first, *others = parts
        head = _header(kind, first.dtype, len(parts), len(note), first.shape)
        offset = self.plan.message(slot, turn)
        self._memory[offset : offset + _HEADER.size] = head
        if note:
            struct.pack_into(f"<{len(note)}q", self._memory, offset + _HEADER.size, *note)
        views = self._views(offset, head)
        views[0].copy_(first)
        for view, part in zip(views[1:], others, strict=True):
            assert part.shape == first.shape, "the parts of one collective differ in shape"
            assert part.dtype == first.dtype, "the parts of one collective differ in dtype"
            view.copy_(part)

    def read(self, slot: int, turn: int) -> Message:
        """The message of a member."""
        offset = self.plan.message(slot, turn)
        head = self._memory[offset : offset + _HEADER.size]
        note = head[NOTED] and struct.unpack_from(f"<{head[NOTED]}q", self._memory, offset + _HEADER.size)
        return Message(head, self._views(offset, head), note or ())

    def _make_views(self, offset: int, head: bytes) -> list[Tensor]:
        """The tensors that a header promises. They are remembered: making them takes longer than a small sum."""
        _, dtype, count, _, dims, *sizes = _HEADER.unpack(head)
        shape = torch.Size(sizes[:dims])
        size, first = shape.numel() * DTYPES[dtype].itemsize, offset + _DATA
        starts = [first + i * size for i in range(count)]
        return [self._bytes[start : start + size].view(DTYPES[dtype]).view(shape) for start in starts]


@lru_cache(4096)
def _header(kind: int, dtype: torch.dtype, count: int, noted: int, shape: torch.Size) -> bytes:
    size = count * shape.numel() * dtype.itemsize
    if _DATA + size > MESSAGE_BYTES:
        raise CapacityError(f"{size} bytes for one collective, at most {MESSAGE_BYTES} fit: use smaller steps")
    sizes = (*shape, *(0,) * (_DIMS - len(shape)))
    return _HEADER.pack(kind, DTYPES.index(dtype), count, noted, len(shape), *sizes)
