"""Bytes between GPUs of one host: the reader maps the writer's memory (CUDA IPC) and its device copies from there.

The memory is mapped on the reader's device, which reaches it over NVLink or PCIe (the driver enables peer access), as
NCCL does; both processes may see different devices. All copies of a batch are one launch, on a stream of their own,
beside the model's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import msgspec
import torch
from torch import Tensor

from tessera.core.errors import ConfigError, Conflict, PeerError
from tessera.transfer.base import Runs
from tessera.transfer.mover import Regions, starts
from tessera.transfer.optional import library

# Of a storage, as `torch.UntypedStorage` tells and takes it: device, handle, bytes, offset, the counter of its readers
# and its offset there, an event, whether that must be waited for.
Storage = tuple[int, bytes, int, int, bytes, int, bytes, bool]

CopyRuns = Callable[[Runs, Mapping[int, int], Mapping[int, int], torch.device], Iterator[None]]


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
        self._copy_runs: CopyRuns = library(self.kind, ("tessera.transfer.triton_copy",), "Install triton.").copy_runs

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
        return CudaIpcSource(shared, own, devices.pop(), self._copy_runs)

    def close(self) -> None:
        """Readers let go of the memory themselves."""


def _check(number: int, memory: Tensor) -> None:
    if not memory.is_cuda:
        flag, reason = "--disaggregation-transfer-backend cuda_ipc", f"region {number} is in memory of the host"
        raise ConfigError([Conflict((flag,), reason, "Use local between processes of one host without GPUs.")])


class CudaIpcSource:
    """See `Source`."""

    def __init__(self, shared: dict[int, Shared], own: Regions, device: torch.device, copy_runs: CopyRuns) -> None:
        self._own, self._device, self._copy_runs = starts(own), device, copy_runs
        try:
            self._theirs = {number: _mapped(region, device) for number, region in shared.items()}
        except RuntimeError as error:
            remedy = "do both processes see GPUs of one host, and can these reach each other?"
            raise PeerError(f"the writer's GPU memory cannot be mapped on {device} ({error}): {remedy}") from error
        self._stream = torch.cuda.Stream(device)
        self._event = torch.cuda.Event(blocking=True)

    def copy(self, runs: Runs, stop: threading.Event) -> None:
        """See `Source.copy`."""
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                for _ in self._copy_runs(runs, starts(self._theirs), self._own, self._device):
                    self._event.record(self._stream)
                    self._event.synchronize()
                    if stop.is_set():
                        return
        except RuntimeError as error:
            raise PeerError(f"a copy from the writer's GPU failed: {error}") from error

    def close(self) -> None:
        """See `Source.close`. What had begun when a copy failed is over first."""
        self._stream.synchronize()
        self._theirs = {}


def _mapped(region: Shared, device: torch.device) -> Tensor:
    """The writer's memory as a row of bytes on `device`."""
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *region.storage[1:])
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return whole[region.first : region.first + region.length]
