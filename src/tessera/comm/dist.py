"""Collectives through torch.distributed: gloo among CPU ranks of one or several hosts, NCCL among GPUs.

One process group per group of ranks, made from the meeting's store and known to nobody else. The backends run a
collective on the side: gloo on threads, NCCL on a stream of its own, which the current stream waits for in `wait`
without the host. So on CUDA a collective that never ends is found not by `wait` but by NCCL's watchdog, which ends the
process after `deadline_s`; on CPU `wait` raises.

GPUs of one host take small collectives into their own hands (`peers.py`), where all ranks bring as much; the rest goes
through the backend.

What is exact. `scatter_sum`, `sum` through peers and `sum` when `ordered` bring the terms together and add them in the
order of ranks, in fp32 or wider, rounded once: the same bits everywhere. `sum` is otherwise the backend's all-reduce,
faster and in another order: on CPU in fp32 or wider, on CUDA in the dtype of the parts, rounded at every addition (with
two ranks there is one, so it is the same sum).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Dtype, Handle, Ready, ordered_sum
from tessera.comm.meet import Meeting
from tessera.core.config.needs import Sketch
from tessera.core.errors import DeadlineError, PeerError
from tessera.core.mesh import Mesh

if TYPE_CHECKING:
    from tessera.comm.peers import PeerCollectives

NCCL_GROUP = 512 << 20  # bytes of a communicator between GPUs of one host, rounded up

NOISE = re.compile(r"^\[\S+\.cc:\d+\] | This is typically caused by .*")  # of gloo: for those who develop it
GONE = re.compile(
    r"clos(ed|ing)|reset by peer|broken pipe|connection refused|no route|remote (error|process)|unreachable|abort",
    re.IGNORECASE,
)  # in what the backends say when a connection ends
Ranks = tuple[int, ...]
Mapped = Callable[[Meeting, Ranks, torch.device], "PeerCollectives | None"]


@dataclass
class _Work:
    """A collective under way. `finish` holds the buffers and makes the result of them."""

    work: dist.Work
    finish: Callable[[], Tensor]
    what: str
    deadline_s: float

    def wait(self) -> Tensor:
        """The result."""
        with explained(self.what, self.deadline_s):
            self.work.wait()
        return self.finish()


@dataclass(frozen=True)
class _Made:
    """What `finish` makes of the result of another handle."""

    handle: Handle
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """The result."""
        return self.finish(self.handle.wait())


@contextmanager
def explained(what: str, deadline_s: float) -> Iterator[None]:
    """Errors of the backends as `PeerError` or `DeadlineError`. They are all RuntimeErrors: the time and their words
    tell why."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited = time.monotonic() - began
        if waited >= 0.9 * deadline_s:
            raise DeadlineError(f"{what}: nothing came for {waited:.1f} s") from error
        said = NOISE.sub("", str(error).splitlines()[0])
        found = "a rank has ended or left" if GONE.search(said) else "the backend of collectives failed"
        raise PeerError(f"{what}: {found} ({said})") from error


def told_late(mesh: Mesh, rank: int, late: Mapping[str, Sequence[int]], deadline_s: float) -> DeadlineError | None:
    """What a failed wait of a rank's kernels means. `late`: who did not come, by axis, as coordinates.

    Ranks are named and not the axis: axes of the same ranks share one memory, which does not know whose turn it was.
    """
    for axis, coordinates in late.items():
        if coordinates:
            ranks = mesh.group(rank, axis)
            missing = ", ".join(str(ranks[at]) for at in coordinates)
            what = f"rank {rank} in a collective of ranks {', '.join(map(str, ranks))} through the peers' memory"
            return DeadlineError(f"{what}: nothing came from rank {missing} for {deadline_s:g} s")
    return None


class DistComm:
    """The `Comm` of one rank. `backend` makes a group: (store, rank in the group, its size) -> process group."""

    def __init__(
        self,
        meeting: Meeting,
        backend: Callable[[dist.Store, int, int], dist.Backend],
        device: torch.device,
        deadline_s: float,
        ordered: bool,
        mapped: Mapped | None = None,
    ) -> None:
        self.mesh: Mesh = meeting.mesh
        self.rank: int = meeting.rank
        self._device, self._deadline_s, self._ordered = device, deadline_s, ordered
        self._meeting: Meeting | None = meeting  # keeps the store of rank 0 alive
        self._alone = Alone(self.mesh, self.rank)
        groups = {axis.name: self.mesh.group(self.rank, axis.name) for axis in self.mesh.axes}
        made: dict[Ranks, dist.Backend] = {}
        for ranks in self.mesh.groups(self.rank):  # in one order: making one waits
            store = dist.PrefixStore(f"group/{ranks}", meeting.store)
            with explained(f"rank {self.rank} connecting to ranks {ranks}", deadline_s):
                made[ranks] = backend(store, ranks.index(self.rank), len(ranks))
        peers = {} if mapped is None else {ranks: mapped(meeting, ranks, device) for ranks in made}
        self._groups = {axis: made.get(ranks) for axis, ranks in groups.items()}
        self._peers = {axis: peers.get(ranks) for axis, ranks in groups.items()}
        for axis in self.mesh.axes:  # connects, so that a link that does not work is found now
            for start in (self._sum, self.sum):
                total = start([torch.ones(1, device=device)], axis.name).wait().tolist()
                assert total == [axis.size], f"rank {self.rank}: {total} is no sum of {axis.size} ones"
        meeting.all_at("connected")

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """See `Comm.sum`."""
        peers = self._peers.get(axis)
        if peers is not None and len(parts) == 1 and peers.sums(parts[0], 1):
            return peers.sum(parts[0], 1, dtype)
        return self._sum(parts, axis, dtype)

    def _sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        group = self._groups.get(axis)
        if group is None or parts[0].numel() == 0:
            return self._alone.sum(parts, axis, dtype)
        if self._ordered:
            return self._ordered_sum(parts, group, axis, dtype)
        own = parts[0].dtype
        wire = own if parts[0].is_cuda else torch.promote_types(own, torch.float32)
        total = ordered_sum([part.to(wire) for part in parts]).contiguous()
        return self._start(f"sum over '{axis}'", lambda: total.to(dtype or own), group.allreduce, [total])

    def _ordered_sum(self, parts: Sequence[Tensor], group: dist.Backend, axis: str, dtype: Dtype) -> Handle:
        mine = torch.stack(list(parts)) if len(parts) > 1 else parts[0].contiguous()[None]
        everything = mine.new_empty(group.size(), *mine.shape)
        made = partial(_add, everything, mine, dtype)
        return self._start(f"sum over '{axis}'", made, group._allgather_base, everything.flatten(0, 1), mine)

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """See `Comm.gather`. Parts are padded to the longest on the way. Without `lengths` the host waits for them."""
        group = self._groups.get(axis)
        if group is None:
            return self._alone.gather(part, axis, dim, lengths)
        at, length = self.mesh.coordinate(self.rank, axis), part.shape[dim]
        lengths = self._lengths(length, group, axis) if lengths is None else lengths
        assert length == lengths[at], f"{length} elements, {lengths} announced"
        mine, peers = _padded(part, dim, max(lengths)), self._peers.get(axis)
        if peers is not None and peers.takes(mine.nbytes):
            return _Made(peers.gather(mine), partial(_join, dim=dim, lengths=lengths, _sent=mine))
        everything = mine.new_empty(group.size(), *mine.shape)
        if everything.numel() == 0:
            return Ready(_join(everything, dim, lengths, mine))
        made, into = partial(_join, everything, dim, lengths, mine), _raw(everything.flatten(0, 1))
        return self._start(f"gather over '{axis}'", made, group._allgather_base, into, _raw(mine))

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """See `Comm.scatter_sum`. Each rank gets the terms of what it keeps, unpadded, and adds them itself."""
        group = self._groups.get(axis)
        if group is None:
            return self._alone.scatter_sum(parts, axis, dim, lengths, dtype)
        first = parts[0]
        assert first.shape[dim] == sum(lengths), f"{first.shape[dim]} elements to cut into {lengths}"
        shape = list(first.shape)
        shape[dim] = lengths[self.mesh.coordinate(self.rank, axis)]
        peers = self._peers.get(axis)
        if peers is not None and len(parts) == 1 and _even(lengths) and peers.sums(first, group.size()):
            return _Made(peers.sum(_by_owner(parts, dim, lengths), group.size(), dtype), lambda kept: kept.view(shape))
        terms = first.new_empty(group.size(), len(parts), *shape)
        if first.numel() == 0:
            return Ready(terms[0, 0].to(dtype or terms.dtype))
        sent = _by_owner(parts, dim, lengths)
        unit = len(sent) // sum(lengths)
        shares = [unit * n for n in lengths]
        made, mine = partial(_add, terms, sent, dtype), [terms[0].numel()] * group.size()
        what = f"scatter_sum over '{axis}'"
        return self._start(what, made, group.alltoall_base, terms.flatten(), sent, mine, shares)

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """See `Comm.exchange`. Without `received` the host waits for it."""
        group = self._groups.get(axis)
        if group is None:
            return self._alone.exchange(part, axis, sent, received)
        assert len(part) == sum(sent), f"{len(part)} rows to cut into {sent}"
        received = self._counts(sent, group, axis) if received is None else received
        got, row = part.new_empty(sum(received), *part.shape[1:]), part.shape[1:].numel()
        flat, into = _raw(part.flatten()), _raw(got.view(-1))
        splits = [row * n for n in received], [row * n for n in sent]
        return self._start(
            f"exchange over '{axis}'", partial(_first, got, flat), group.alltoall_base, into, flat, *splits
        )

    def forget(self) -> None:
        """See `Comm.forget`."""
        for peers in self._peers.values():
            if peers is not None:
                peers.forget()

    def fault(self) -> DeadlineError | None:
        """See `Comm.fault`."""
        late = {axis: peers.late for axis, peers in self._peers.items() if peers is not None}
        return told_late(self.mesh, self.rank, late, self._deadline_s)

    def close(self) -> None:
        """See `Comm.close`. Waits, up to the deadline, for what the GPU has still to do: the others may need it."""
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # a device that has failed does nothing more
                done, until = torch.cuda.Event(), time.monotonic() + self._deadline_s
                done.record()
                while not done.query() and time.monotonic() < until:
                    time.sleep(0.001)
        for group in {id(group): group for group in self._groups.values() if group is not None}.values():
            group.abort()
        self._meeting = None

    def _start(self, what: str, finish: Callable[[], Tensor], call: Callable[..., dist.Work], *args: object) -> Handle:
        what = f"rank {self.rank} in {what}"
        with explained(what, self._deadline_s):
            return _Work(call(*args), finish, what, self._deadline_s)

    def _lengths(self, length: int, group: dist.Backend, axis: str) -> list[int]:
        mine = torch.tensor([length], device=self._device)
        everything = mine.new_empty(group.size())
        what = f"gather over '{axis}'"
        lengths: list[int] = (
            self._start(what, lambda: everything, group._allgather_base, everything, mine).wait().tolist()
        )
        return lengths

    def _counts(self, sent: Sequence[int], group: dist.Backend, axis: str) -> list[int]:
        mine = torch.tensor(sent, device=self._device)
        counts, ones = torch.empty_like(mine), [1] * group.size()
        made = partial(_first, counts, mine)
        handle = self._start(f"exchange over '{axis}'", made, group.alltoall_base, counts, mine, ones, ones)
        received: list[int] = handle.wait().tolist()
        return received


def _first(result: Tensor, _sent: Tensor) -> Tensor:
    return result


def _even(lengths: Sequence[int]) -> bool:
    return min(lengths) == max(lengths)


def _raw(x: Tensor) -> Tensor:
    """One-byte elements as plain bytes: the backends do not know all of these dtypes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _padded(part: Tensor, dim: int, length: int) -> Tensor:
    """The part in one piece, with zeros behind it up to `length` along `dim`."""
    if part.shape[dim] == length:
        return part.contiguous()
    shape = list(part.shape)
    shape[dim] = length
    padded = part.new_zeros(shape)
    padded.narrow(dim, 0, part.shape[dim]).copy_(part)
    return padded


def _join(everything: Tensor, dim: int, lengths: Sequence[int], _sent: Tensor) -> Tensor:
    """everything [ranks, padded part] -> the parts side by side."""
    if dim == 0 and min(lengths) == max(lengths):
        return everything.flatten(0, 1)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(everything, lengths, strict=True)], dim)


def _by_owner(parts: Sequence[Tensor], dim: int, lengths: Sequence[int]) -> Tensor:
    """What goes to coordinate 0 of all parts, then what goes to coordinate 1 ..., flat."""
    if len(parts) == 1 and dim == 0:
        return parts[0].flatten()
    cuts = zip(*(part.split(list(lengths), dim) for part in parts), strict=True)
    return torch.cat([torch.stack(cut).flatten() for cut in cuts])


def _add(terms: Tensor, _sent: Tensor, dtype: Dtype) -> Tensor:
    """terms [ranks, parts, ...] -> their sum in this order."""
    return ordered_sum(terms.flatten(0, 1).unbind(), dtype)


def gloo(meeting: Meeting, device: torch.device, deadline_s: float, ordered: bool) -> DistComm:
    """Collectives of CPU ranks over TCP."""
    limit = timedelta(seconds=deadline_s)
    return DistComm(meeting, partial(_gloo, limit), device, deadline_s, ordered)


def _gloo(limit: timedelta, store: dist.Store, rank: int, size: int) -> dist.Backend:
    return dist.ProcessGroupGloo(store, rank, size, limit)


def nccl_bytes(sketch: Sketch) -> int:
    """Bytes of NCCL's buffers on a rank: of every group of ranks, from its first collectives on."""
    return len(sketch.mesh.groups(0)) * NCCL_GROUP if sketch.ranks.collectives == "nccl" else 0


def nccl(meeting: Meeting, device: torch.device, deadline_s: float, ordered: bool, peers: bool) -> DistComm:
    """Collectives of GPU ranks, one GPU each. `peers`: small ones through each other's memory, on one host."""
    torch.cuda.set_device(device)
    limit = timedelta(seconds=deadline_s)
    return DistComm(meeting, partial(_nccl, limit), device, deadline_s, ordered, _mapped(deadline_s) if peers else None)


def _mapped(deadline_s: float) -> Mapped:
    from tessera.comm.peers import connect_peers

    return partial(connect_peers, deadline_s=deadline_s)


def _nccl(limit: timedelta, store: dist.Store, rank: int, size: int) -> dist.Backend:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, size, options)
