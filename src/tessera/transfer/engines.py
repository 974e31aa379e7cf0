"""Makes the transfer engine that was asked for by name."""

from __future__ import annotations

import logging
import socket
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


ANYWHERE = {"", "0.0.0.0", "::"}
_BEYOND = ("192.0.2.1", 9)  # an address of nobody (RFC 5737); nothing is sent there
_log = logging.getLogger(__name__)


def make_engine(kind: str, host: str = "127.0.0.1", devices: str | None = None) -> Engine:
    """One rank's engine. `host`: the address at which peers reach this one (the engines of one host do without).

    `devices`: network devices for those that can choose (--disaggregation-ib-device). Raises `ConfigError` for a kind
    that is not known, or whose library is not installed.
    """
    if kind not in MOVERS:
        flag = f"--disaggregation-transfer-backend {kind}"
        raise ConfigError([Conflict((flag,), "there is no such engine", f"Choose one of {', '.join(MOVERS)}.")])
    mover = MOVERS[kind](outward(host) if host in ANYWHERE else host, devices)
    if mover.host not in (None, host):
        _log.info("transfer engine %s is reached at %s, since --host %s is no address", kind, mover.host, host)
    return PullEngine(mover)


def outward(host: str) -> str:
    """This host's address towards others, in place of one that stands for all of them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_BEYOND)
        except OSError:  # no route: nobody is beyond
            return "127.0.0.1"
        return str(probe.getsockname()[0])
