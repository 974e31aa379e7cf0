"""One call that gives a rank its collectives, of whatever kind.

threads  ranks are threads of one process; for tests
shared   CPU ranks of one host, through shared memory
gloo     CPU ranks of one or several hosts, over TCP
nccl     one GPU a rank
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from tessera.comm import dist
from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.comm.local import LocalGroup
from tessera.comm.meet import Meeting, meet
from tessera.comm.shared import SharedComm
from tessera.core.errors import ConfigError, Conflict
from tessera.core.mesh import Mesh


@dataclass(frozen=True)
class Place:
    """A rank that wants to join. `address`: host:port at rank 0, the same for all; for threads any word.

    `join_s`: how long it waits for the others to come; `deadline_s`: how long in one collective. `ordered`: sums add in
    the order of ranks, the same bits on every layout of the wire (`threads` and `shared` always do). `listening`: at
    rank 0, the descriptor of a socket that listens at `address` already; it is given away. `peers`: small collectives
    of GPUs go through each other's memory (`peers.py`); all are on one host.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    address: str
    kind: str
    join_s: float = 120.0
    deadline_s: float = 30.0
    ordered: bool = False
    listening: int | None = None
    peers: bool = False


def connect(place: Place) -> Comm:
    """Joins the other ranks. An instance of one rank needs nobody.

    Raises ConfigError when the kind is unknown or not for this device, the port is taken or the ranks disagree;
    DeadlineError naming the ranks that did not come; PeerError when one failed meanwhile.
    """
    if place.mesh.size == 1:
        return Alone()
    device_type, join = KINDS.get(place.kind, (None, None))
    if join is None or device_type != place.device.type:
        fits = [kind for kind, (type_, _) in KINDS.items() if type_ == place.device.type]
        reason = f"'{place.kind}' collectives do not run on {place.device}"
        raise ConfigError([Conflict(("collectives", str(place.device)), reason, f"Choose from {fits}")])
    return join(place)


def _threads(place: Place) -> Comm:
    with _THREADS_LOCK:
        group = _THREADS.setdefault(place.address, LocalGroup(place.mesh, place.deadline_s))
    if group.mesh != place.mesh:
        reason = f"rank {place.rank} has {place.mesh}, the others {group.mesh}"
        raise ConfigError([Conflict(("collectives",), reason, "Start all ranks with the same flags")])
    return group.join(place.rank, place.join_s)


def _meeting(place: Place) -> Meeting:
    return meet(place.mesh, place.rank, place.address, place.kind, place.join_s, place.listening)


def _shared(place: Place) -> Comm:
    return SharedComm(_meeting(place), place.deadline_s)


def _gloo(place: Place) -> Comm:
    return dist.gloo(_meeting(place), place.device, place.deadline_s, place.ordered)


def _nccl(place: Place) -> Comm:
    return dist.nccl(_meeting(place), place.device, place.deadline_s, place.ordered, place.peers)


# Groups of threads by address; one lives as long as a rank of it.
_THREADS: WeakValueDictionary[str, LocalGroup] = WeakValueDictionary()
_THREADS_LOCK = threading.Lock()

KINDS: dict[str, tuple[str, Callable[[Place], Comm]]] = {
    "threads": ("cpu", _threads),
    "shared": ("cpu", _shared),
    "gloo": ("cpu", _gloo),
    "nccl": ("cuda", _nccl),
}
