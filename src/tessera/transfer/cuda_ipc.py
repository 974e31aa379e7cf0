"""Bytes between GPUs of one host: the reader maps the writer's memory (CUDA IPC) and its device copies from there.

The memory is mapped on the reader's device, which reaches it over NVLink or PCIe (the driver enables peer access), as
NCCL does; both processes may see different devices. All copies of a batch are one launch, on a stream of their own,
beside the model's.
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import torch
from torch import Tensor

from tessera.core.errors import ConfigError, Conflict, PeerError
from tessera.transfer.base import PerRegion, Runs
from tessera.transfer.mover import Regions, Wait, addressed, starts
from tessera.transfer.optional import library

# Of a storage, as `torch.UntypedStorage` tells and takes it: device, handle, bytes, offset, the counter of its readers
# and its offset there, an event, whether that must be waited for.
Storage = tuple[int, bytes, int, int, bytes, int, bytes, bool]


class Shared(msgspec.Struct, frozen=True):
    """A region of the writer: its storage, and where in it the region lies."""

    storage: Storage
    first: int
    length: int


class CudaIpcMover:
    """See `Mover`."""

    kind = "cuda_ipc"
    host = None

    def __init__(self) -> None:
        self._copies = library(self.kind, ("tessera.transfer.triton_copy",), "Install triton.")

    def export(self, regions: Regions) -> bytes:
        """See `Mover.export`. Each call counts a reader, until which memory of the writer is not given back."""
        shared = {}
        for number, memory in regions.items():
            _check(number, memory)
            told = memory.untyped_storage()._share_cuda_()
            shared[number] = Shared(told, memory.storage_offset(), memory.numel())
        return msgspec.msgpack.encode(shared)

    def open(self, exported: bytes, own: Regions) -> CudaIpcSource:
        """See `Mover.open`."""
        for number, memory in own.items():
            _check(number, memory)
        devices = {memory.device for memory in own.values()}
        if len(devices) != 1:
            raise PeerError(f"the reader has regions on {len(devices)} devices, one is expected")
        shared = msgspec.msgpack.decode(exported, type=dict[int, Shared])
        return CudaIpcSource(shared, own, devices.pop(), self._copies)

    def close(self) -> None:
        """Readers let go of the memory themselves."""


def _check(number: int, memory: Tensor) -> None:
    if not memory.is_cuda:
        flag, reason = "--disaggregation-transfer-backend cuda_ipc", f"region {number} is in memory of the host"
        raise ConfigError([Conflict((flag,), reason, "Use local between processes of one host without GPUs.")])


class CudaIpcSource:
    """See `Source`."""

    def __init__(self, shared: dict[int, Shared], own: Regions, device: torch.device, copies: Any) -> None:
        self._own = own  # holds on to the memory
        try:
            self._theirs = {number: _mapped(region, device) for number, region in shared.items()}
        except RuntimeError as error:
            remedy = "do both processes see GPUs of one host, and can these reach each other?"
            raise PeerError(f"the writer's GPU memory cannot be mapped on {device} ({error}): {remedy}") from error
        self._places = PerRegion(starts(self._theirs), starts(own))
        self._stream = torch.cuda.Stream(device)
        torch.cuda.set_device(device)  # both of this thread, for good: to change them for each copy takes as long as
        torch.cuda.set_stream(self._stream)  # its launch
        self._copies = copies.Copier(device, self._mark)

    def copy(self, runs: Runs, stop: threading.Event) -> Wait | None:
        """See `Source.copy`. Of a batch of several calls the last is under way when it returns."""
        wait: Wait | None = None
        try:
            for begun in self._copies(addressed(runs, self._places)):
                if wait is not None:
                    wait()
                if stop.is_set():
                    return None
                wait = begun
        except RuntimeError as error:
            raise _failed(error) from error
        return wait

    def _mark(self) -> Wait:
        """Waits for what the stream was given until now. The host looks all the time: to be woken takes long."""
        event = torch.cuda.Event()
        event.record(self._stream)

        def wait() -> None:
            try:
                event.synchronize()
            except RuntimeError as error:
                raise _failed(error) from error

        return wait

    def close(self) -> None:
        """See `Source.close`. What had begun when a copy failed is over first."""
        self._stream.synchronize()
        self._theirs = {}


def _failed(error: RuntimeError) -> PeerError:
    return PeerError(f"a copy from the writer's GPU failed: {error}")


def _mapped(region: Shared, device: torch.device) -> Tensor:
    """The writer's memory as a row of bytes on `device`.

    What is posted is computed, so the event that comes with the memory is not waited for: its GPU may be one that this
    process does not see, as when either server was given one of its own.
    """
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *region.storage[1:-1], False)
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return whole[region.first : region.first + region.length]
