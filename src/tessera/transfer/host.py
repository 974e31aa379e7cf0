"""Bytes between processes of one host: the reader copies out of the writer's memory (process_vm_readv of Linux).

One copy, no shared allocation: any host tensor can be registered. A call takes up to 1024 runs, without Python's lock.
It needs the right to trace the writer: the same user in the same container. Where Yama allows a process its children
only, the writer gives readers that right (PR_SET_PTRACER).
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import threading

import msgspec
import numpy as np

from tessera.core.errors import ConfigError, Conflict, PeerError
from tessera.transfer.base import PerRegion, Runs
from tessera.transfer.mover import Regions, addressed, calls, starts

_RUNS = 1024  # the kernel's limit of one call (UIO_MAXIOV)
_BYTES = 1 << 26  # of a call: a fence waits no longer than that
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_IOVECS = (ctypes.c_void_p, ctypes.c_ulong)
_libc.process_vm_readv.argtypes = (ctypes.c_int, *_IOVECS, *_IOVECS, ctypes.c_ulong)


class Exported(msgspec.Struct, frozen=True):
    """Where the regions lie in which process. Whoever finds `nonce` at `proof` there can read the regions."""

    pid: int
    starts: dict[int, int]
    proof: int
    nonce: bytes


class HostMover:
    """See `Mover`."""

    kind = "local"
    host = None

    def __init__(self) -> None:
        self._nonce = np.frombuffer(secrets.token_bytes(16), np.uint8)

    def export(self, regions: Regions) -> bytes:
        """See `Mover.export`."""
        _check(regions)
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # fails where there is no Yama, and nothing is needed
        proof = self._nonce.ctypes.data
        return msgspec.msgpack.encode(Exported(os.getpid(), starts(regions), proof, self._nonce.tobytes()))

    def open(self, exported: bytes, own: Regions) -> HostSource:
        """See `Mover.open`."""
        _check(own)
        return HostSource(msgspec.msgpack.decode(exported, type=Exported), own)

    def close(self) -> None:
        """Nothing was set up."""


def _check(regions: Regions) -> None:
    if devices := sorted({str(memory.device) for memory in regions.values() if memory.device.type != "cpu"}):
        flag = "--disaggregation-transfer-backend local"
        reason = f"there are regions on {', '.join(devices)}, and it copies memory of the host"
        raise ConfigError([Conflict((flag,), reason, "Use cuda_ipc between GPUs of one host.")])


class HostSource:
    """See `Source`. Raises `PeerError` when the writer's memory cannot be read from here."""

    def __init__(self, writer: Exported, own: Regions) -> None:
        self._writer = writer
        self._own = own  # holds on to the memory
        self._places = PerRegion(writer.starts, starts(own))
        found = np.zeros(len(writer.nonce), np.uint8)
        size = np.array([len(found)], np.uint64)
        self._read(np.array([found.ctypes.data], np.uint64), np.array([writer.proof], np.uint64), size)
        if found.tobytes() != writer.nonce:
            raise PeerError(
                f"process {writer.pid} is not the writer: is that on another host, or in another container?"
            )

    def copy(self, runs: Runs, stop: threading.Event) -> None:
        """See `Source.copy`."""
        src, dst, lengths = addressed(runs, self._places, _BYTES)
        for some in calls(lengths, _RUNS, _BYTES):
            if stop.is_set():
                return
            self._read(dst[some], src[some], lengths[some])

    def _read(self, dst: np.ndarray, src: np.ndarray, lengths: np.ndarray) -> None:
        local, remote = np.stack([dst, lengths], 1), np.stack([src, lengths], 1)
        found = _libc.process_vm_readv(
            self._writer.pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0
        )
        if found == int(lengths.sum()):
            return
        number = ctypes.get_errno() if found < 0 else errno.EFAULT
        raise PeerError(_reason(self._writer.pid, number))

    def close(self) -> None:
        """Nothing is under way when no `copy` runs."""


def _reason(pid: int, number: int) -> str:
    if number == errno.ESRCH:
        return f"the writer (process {pid}) has left, or is in another container"
    if number == errno.EPERM:
        remedy = "run both servers as one user in one container that allows ptrace, or use another transfer engine"
        return f"this process may not read the writer's memory (process {pid}): {remedy}"
    return f"the memory of the writer (process {pid}) cannot be read: {os.strerror(number)}"
