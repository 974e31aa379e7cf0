"""Bytes between hosts by Mooncake's transfer engine (kvcache-ai/Mooncake): RDMA where the host has it, else TCP.

The reader makes a Mooncake engine for each writer, so that a writer that fails or is fenced can be torn down with all
that it has under way, and nobody else. Mooncake's reads cannot be broken off: a fence waits for those of one call, and
these end after 30 s at the latest when the writer hangs.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import msgspec

from tessera.core.errors import ConfigError, Conflict, PeerError
from tessera.transfer.base import PerRegion, Runs
from tessera.transfer.mover import Regions, addressed, calls, starts
from tessera.transfer.optional import library

REMEDY = (
    "Install the extra: pip install 'tessera-llm[mooncake]' (mooncake-transfer-engine-non-cuda where there is no GPU; "
    "either needs libibverbs1 of the distribution)."
)
_RUNS, _BYTES = 1024, 1 << 26  # of a call
_log = logging.getLogger(__name__)


class Exported(msgspec.Struct, frozen=True):
    """Mooncake's name of the writer, and where its regions begin."""

    session: str
    protocol: str
    starts: dict[int, int]


class MooncakeMover:
    """See `Mover`. `devices`: RDMA devices, comma separated; without them all that the host has."""

    kind = "mooncake"

    def __init__(self, host: str, devices: str | None) -> None:
        self._library = library("mooncake", ("mooncake.engine",), REMEDY)
        self.host = host
        self._devices = devices or ""
        self._protocol = "rdma" if devices or _has_rdma() else "tcp"
        self._exporting: Any = None
        self._exported: set[int] = set()

    def export(self, regions: Regions) -> bytes:
        """See `Mover.export`."""
        if self._exporting is None:
            self._exporting = self.make()
            _log.info("mooncake over %s: %s", self._protocol, self._devices or "all devices")
        for number, memory in regions.items():
            if number not in self._exported:
                register(self._exporting, memory)
                self._exported.add(number)
        session = f"{self.host}:{self._exporting.get_rpc_port()}"
        return msgspec.msgpack.encode(Exported(session, self._protocol, starts(regions)))

    def make(self) -> Any:
        """A Mooncake engine of its own."""
        made = self._library.TransferEngine()
        if code := made.initialize(self.host, "P2PHANDSHAKE", self._protocol, self._devices):
            what = f"--disaggregation-ib-device {self._devices}" if self._devices else f"mooncake over {self._protocol}"
            raise ConfigError([Conflict((what,), f"it cannot start on {self.host} (code {code})", "See its log.")])
        return made

    def open(self, exported: bytes, own: Regions) -> MooncakeSource:
        """See `Mover.open`."""
        writer = msgspec.msgpack.decode(exported, type=Exported)
        if writer.protocol != self._protocol:
            raise PeerError(f"the writer uses mooncake over {writer.protocol}, this side over {self._protocol}")
        return MooncakeSource(writer, self.make(), own)

    def close(self) -> None:
        """See `Mover.close`."""
        self._exporting = None


def _has_rdma() -> bool:
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def register(engine: Any, memory: Any) -> None:
    """Makes memory known to a Mooncake engine."""
    if code := engine.register_memory(memory.data_ptr(), memory.nbytes):
        raise PeerError(f"mooncake cannot register {memory.nbytes} bytes of {memory.device} (code {code})")


class MooncakeSource:
    """See `Source`."""

    def __init__(self, writer: Exported, engine: Any, own: Regions) -> None:
        self._writer, self._engine = writer, engine
        self._own, self._places = own, PerRegion(writer.starts, starts(own))
        for memory in own.values():
            register(engine, memory)

    def copy(self, runs: Runs, stop: threading.Event) -> None:
        """See `Source.copy`."""
        src, dst, lengths = addressed(runs, self._places, _BYTES)
        for some in calls(lengths, _RUNS, _BYTES):
            if stop.is_set():
                return
            what = dst[some].tolist(), src[some].tolist(), lengths[some].tolist()
            if code := self._engine.batch_transfer_sync_read(self._writer.session, *what):
                raise PeerError(f"mooncake could not read from {self._writer.session} (code {code})")

    def close(self) -> None:
        """See `Source.close`. The engine ends with its last reference: it joins its threads."""
        self._engine = None
