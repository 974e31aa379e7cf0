"""Small collectives through the memory of the other GPUs of a host (CUDA IPC over NVLink or PCIe), without NCCL.

A step of a few hundred tokens meets two collectives a layer of about a megabyte, for which NCCL takes 20 to 25 us each,
most of it latency. Here each is two short kernels (`triton_peers.py`) on the current stream: one when the collective is
begun, one when it is waited for, and what is computed in between hides the way.

How many slots. Up to `WINDOW` (D) collectives of a group are under way on a rank; more go another way, on all ranks
alike, since all begin and wait for the same ones in the same order. Before use m begins a rank has received
all up to m - D, so each peer had begun m - D, so it had received all up to m - 2 D: 2 D slots in turn are never written
before they have been read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor

from tessera.comm.meet import Meeting
from tessera.comm.peer_memory import CHANNELS, MOST_RANKS, REGION, SLOTS, WINDOW, slot_sizes
from tessera.comm.triton_peers import receive, send
from tessera.core.errors import ConfigError, Conflict
from tessera.core.mesh import share

LARGEST = CHANNELS * REGION  # bytes that a rank sends to each other one at most; NCCL moves larger ones as fast
BLOCK = 1 << 14  # bytes that a program moves at once; one for all sizes, since each is compiled when it is met first
SUMMED = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Memory:
    """Of one rank: `addresses` [2, W] int64 of the slots and of the flags of all ranks as it sees them, its own
    `counters` [C] int32; in the host's memory `late` [W] int32: 1 for peers that did not come in time. `kept`: what
    keeps all that alive."""

    addresses: Tensor
    counters: Tensor
    late: Tensor
    kept: Any


def sizes(world: int) -> tuple[int, int]:
    """Bytes of the slots and of the flags of a rank."""
    return slot_sizes(world, SLOTS, CHANNELS, REGION)


class PeerCollectives:
    """The collectives of rank `at` of a group of `world`, all of whose ranks bring as much."""

    def __init__(self, memory: Memory, at: int, world: int, deadline_s: float) -> None:
        self.memory, self.at, self.world = memory, at, world
        self._limit = int(deadline_s * 1e9)
        device = memory.counters.device
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._chained = {"launch_pdl": True} if able else {}
        self._begun = 0
        self._waiting: list[int] = []

    def takes(self, num_bytes: int) -> bool:
        """Whether a collective that sends so many bytes to each other rank can go this way now; alike on all ranks."""
        free = not self._waiting or self._begun - self._waiting[0] < WINDOW - 1
        return free and 0 < num_bytes <= LARGEST

    def sums(self, part: Tensor, pieces: int) -> bool:
        """Whether `sum` can go this way now; alike on all ranks. Each peer gets a copy of a whole one."""
        sent = share(part.nbytes, pieces) if pieces > 1 else part.nbytes * (self.world - 1)
        return part.dtype in SUMMED and self.takes(sent)

    def gather(self, part: Tensor) -> UnderWay:
        """The parts of all ranks [W, ...]."""
        whole = part.new_empty(self.world, *part.shape)
        wide = torch.int32 if part.nbytes % 4 == 0 else torch.uint8  # it is only copied
        return self._begin(_flat(part).view(wide), whole.view(-1).view(wide), whole, False, False)

    def sum(self, part: Tensor, pieces: int, dtype: torch.dtype | None = None) -> UnderWay:
        """The sum of the parts in order of ranks, of which each keeps all, or (flat) its own of as many `pieces` as
        there are ranks; rounded to `dtype` (the parts')."""
        kept = part.new_empty(part.shape if pieces == 1 else (share(len(part), pieces),), dtype=dtype or part.dtype)
        return self._begin(_flat(part), kept.view(-1), kept, pieces > 1, True)

    @property
    def late(self) -> list[int]:
        """Whom a wait that failed was for, by their places in the group; also when the device can tell nothing more."""
        return [at for at, is_late in enumerate(self.memory.late.tolist()) if is_late]

    def forget(self) -> None:
        """Nothing is under way: what was begun was never launched."""
        self._waiting.clear()

    def _begin(self, x: Tensor, out: Tensor, result: Tensor, scatters: bool, sums: bool) -> UnderWay:
        """x and out flat; `result` is out as it is wanted."""
        num = share(x.numel(), self.world) if scatters else x.numel()
        size = x.element_size()
        chunk = triton.cdiv(triton.cdiv(num, CHANNELS), 16) * 16
        shared = {
            "memory_ptr": self.memory.addresses[0], "flags_ptr": self.memory.addresses[1], "num": num, "chunk": chunk,
            "counters_ptr": self.memory.counters, "RANK": self.at, "WORLD": self.world, "SCATTERS": scatters,
            "SLOTS": SLOTS, "REGION": REGION // size, "BLOCK": BLOCK // size,
            "num_warps": 8, **self._chained,
        }  # fmt: skip
        send[CHANNELS,](x_ptr=x, **shared)
        self._begun += 1
        self._waiting.append(self._begun)
        number = self._begun

        def finish() -> Tensor:
            later = self._begun - number
            self._waiting.remove(number)
            timed = {"late_ptr": self.memory.late, "later": later, "limit_ns": self._limit}
            receive[CHANNELS,](x_ptr=x, out_ptr=out, SUMS=sums, **timed, **shared)
            return result

        return UnderWay(finish)


def _flat(part: Tensor) -> Tensor:
    """In one piece that begins where a program can load 16 bytes at once."""
    flat = part.flatten()
    return flat.clone() if flat.data_ptr() % 16 else flat


@dataclass(frozen=True)
class UnderWay:
    """A collective that was begun."""

    finish: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """The result; the host does not wait."""
        return self.finish()


def connect_peers(
    meeting: Meeting, ranks: tuple[int, ...], device: torch.device, deadline_s: float
) -> PeerCollectives | None:
    """Maps the memory of all `ranks` of a group; None where they are too many. A rank's memory is ready when it tells.

    Raises ConfigError where memory cannot be mapped.
    """
    at, world = ranks.index(meeting.rank), len(ranks)
    if world > MOST_RANKS:
        return None
    slots, flags = (torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes(world))
    counters = torch.zeros(CHANNELS, dtype=torch.int32, device=device)
    late = torch.zeros(world, dtype=torch.int32, pin_memory=True)
    torch.cuda.synchronize(device)
    mine = [slots, flags]
    told = [(own.untyped_storage()._share_cuda_(), own.storage_offset()) for own in mine]
    meeting.say(f"memory {ranks} of {meeting.rank}", msgspec.json.encode(told).decode())
    try:
        theirs = [mine if r == meeting.rank else _mapped(meeting.ask(f"memory {ranks} of {r}"), device) for r in ranks]
    except RuntimeError as error:
        reason = f"memory of another GPU cannot be mapped ({str(error).splitlines()[0]})"
        remedy = "Give --disable-custom-all-reduce: all collectives go through NCCL then."
        raise ConfigError([Conflict(("collectives", str(device)), reason, remedy)]) from error
    addresses = torch.tensor([[pair[i].data_ptr() for pair in theirs] for i in range(len(mine))], device=device)
    return PeerCollectives(Memory(addresses, counters, late, theirs), at, world, deadline_s)


def _mapped(told: str, device: torch.device) -> list[Tensor]:
    """The memory that a rank told of, on this rank's device, which reaches it over the links."""
    found = []
    kinds = list[tuple[tuple[int, bytes, int, int, bytes, int, bytes, bool], int]]
    for storage, first in msgspec.json.decode(told, type=kinds):
        mapped = torch.UntypedStorage._new_shared_cuda(device.index, *storage[1:])
        found.append(torch.empty(0, dtype=torch.uint8, device=device).set_(mapped)[first:])
    return found
