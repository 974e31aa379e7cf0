"""Makes the transfer engine that was asked for by name."""

from __future__ import annotations

from collections.abc import Callable

from tessera.core.errors import ConfigError, Conflict
from tessera.transfer.base import Engine
from tessera.transfer.cuda_ipc import CudaIpcMover
from tessera.transfer.host import HostMover
from tessera.transfer.mooncake import MooncakeMover
from tessera.transfer.mover import Mover
from tessera.transfer.nixl import NixlMover
from tessera.transfer.pull import PullEngine

# By kind: from the host and the network devices.
MOVERS: dict[str, Callable[[str, str | None], Mover]] = {
    "local": lambda host, devices: HostMover(),
    "cuda_ipc": lambda host, devices: CudaIpcMover(),
    "mooncake": MooncakeMover,
    "nixl": NixlMover,
}


def make_engine(kind: str, host: str = "127.0.0.1", devices: str | None = None) -> Engine:
    """One rank's engine. `host`: the address at which peers reach this one (the engines of one host do without).

    `devices`: network devices for those that can choose (--disaggregation-ib-device). Raises `ConfigError` for a kind
    that is not known, or whose library is not installed.
    """
    if kind not in MOVERS:
        flag = f"--disaggregation-transfer-backend {kind}"
        raise ConfigError([Conflict((flag,), "there is no such engine", f"Choose one of {', '.join(MOVERS)}.")])
    return PullEngine(MOVERS[kind](host, devices))
