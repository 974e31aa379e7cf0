"""Bytes between hosts, or GPUs, by NIXL (ai-dynamo/nixl) over UCX, which picks the wire: RDMA, TCP, memory of the host.

The reader makes a NIXL agent for each writer, so that a writer that fails, hangs or is fenced can be torn down with all
that it has under way, and nobody else. An agent has a thread, which answers reads over TCP and takes 13 to 27 % of a
core when there is nothing to do.
"""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

import msgspec
import numpy as np

from tessera.core.errors import PeerError
from tessera.transfer.base import PerRegion, Runs
from tessera.transfer.mover import Addresses, Regions, addressed, calls, starts
from tessera.transfer.optional import library

REMEDY = "Install the extra: pip install 'tessera-llm[nixl]' (without a GPU the wheel nixl-cu12 alone does)."
_RUNS, _BYTES = 4096, 1 << 28  # of a call
_SHORT_S, _LONG_S = 50e-6, 1e-3  # between two looks at a call
# What is under way may take so long to end when stopped. Over TCP a writer answers reads one by one, and one whose
# reader was torn down meanwhile has aborted (UCX: "stubs.c:107 Assertion `0' failed"). A writer that hangs is torn down
# all the same.
_DRAIN_S = 1.0


class Exported(msgspec.Struct, frozen=True):
    """What NIXL needs to know of the writer, and where its regions begin. `device`: None in host memory."""

    metadata: bytes
    device: int | None
    starts: dict[int, int]


class NixlMover:
    """See `Mover`. `devices`: network devices for UCX, comma separated."""

    kind = "nixl"

    def __init__(self, host: str, devices: str | None) -> None:
        self._library = library("nixl", ("nixl", "nixl_cu12"), REMEDY)
        self.host = host
        self._options = {"ucx_devices": devices} if devices else {}
        self._exporting: Any = None
        self._exported: set[int] = set()

    def export(self, regions: Regions) -> bytes:
        """See `Mover.export`."""
        if self._exporting is None:
            self._exporting = self.make()
        fresh = {number: memory for number, memory in regions.items() if number not in self._exported}
        register(self._exporting, fresh)
        self._exported |= fresh.keys()
        found = Exported(self._exporting.get_agent_metadata(), _device(regions), starts(regions))
        return msgspec.msgpack.encode(found)

    def make(self) -> Any:
        """A NIXL agent of its own. Without its progress thread TCP is three times slower, however often it is asked."""
        config = self._library.nixl_agent_config(enable_prog_thread=True, backends=[])
        agent = self._library.nixl_agent(secrets.token_hex(8), config)
        agent.create_backend("UCX", self._options)
        return agent

    def open(self, exported: bytes, own: Regions) -> NixlSource:
        """See `Mover.open`."""
        writer = msgspec.msgpack.decode(exported, type=Exported)
        try:
            return NixlSource(writer, self.make(), own)
        except Exception as error:  # what NIXL raises has no base of its own
            raise PeerError(f"nixl cannot reach the writer: {error}") from error

    def close(self) -> None:
        """See `Mover.close`."""
        self._exporting = None


def _device(regions: Regions) -> int | None:
    """The CUDA device of all regions, None for host memory."""
    found = {memory.get_device() if memory.is_cuda else None for memory in regions.values()}
    assert len(found) <= 1, f"regions on several devices: {found}"
    return next(iter(found), None)


def register(agent: Any, regions: Regions) -> None:
    """Makes memory known to a NIXL agent."""
    if regions:
        device = _device(regions)
        rows = [(memory.data_ptr(), memory.nbytes, device or 0, "") for memory in regions.values()]
        agent.register_memory(rows, _kind(device))


def _kind(device: int | None) -> str:
    return "DRAM" if device is None else "VRAM"


class NixlSource:
    """See `Source`."""

    def __init__(self, writer: Exported, agent: Any, own: Regions) -> None:
        self._writer, self._agent = writer, agent
        self._own, self._device = own, _device(own)
        self._places = PerRegion(writer.starts, starts(own))
        self._handle: Any = None
        register(agent, own)
        self._peer = agent.add_remote_agent(writer.metadata)

    def copy(self, runs: Runs, stop: threading.Event) -> None:
        """See `Source.copy`."""
        src, dst, lengths = addressed(runs, self._places, _BYTES)
        for some in calls(lengths, _RUNS, _BYTES):
            if stop.is_set():
                return
            here = self._descriptors(dst[some], lengths[some], self._device)
            there = self._descriptors(src[some], lengths[some], self._writer.device)
            try:
                self._handle = self._agent.initialize_xfer("READ", here, there, self._peer)
                state = self._wait(stop)
            except Exception as error:  # what NIXL raises has no base of its own
                raise PeerError(f"nixl could not read from the writer: {error}") from error
            if state == "ERR":
                raise PeerError("nixl could not read from the writer")
            if state == "PROC":
                return  # stopped; the handle lives until `close`
            self._agent.release_xfer_handle(self._handle)
            self._handle = None

    def _descriptors(self, addresses: Addresses, lengths: Addresses, device: int | None) -> Any:
        rows = np.stack([addresses, lengths, np.full_like(lengths, device or 0)], 1)
        return self._agent.get_xfer_descs(rows, _kind(device))

    def _wait(self, stop: threading.Event) -> str:
        """The state of the handle when it is over (DONE or ERR), or `_DRAIN_S` after `stop` was set (PROC)."""
        state, pause, until = str(self._agent.transfer(self._handle)), _SHORT_S, float("inf")
        while state == "PROC" and time.monotonic() < until:
            if stop.is_set():
                until = min(until, time.monotonic() + _DRAIN_S)
            time.sleep(pause)
            pause = min(pause * 1.2, _LONG_S)
            state = str(self._agent.check_xfer_state(self._handle))
        return state

    def close(self) -> None:
        """See `Source.close`. With the agent goes its UCX worker, which alone puts bytes down."""
        self._handle = None
        self._agent = None
