"""A counter in shared memory that other processes can wait on (futex(2), Linux).

Waiting sleeps in the kernel at once. Spinning first was measured on a machine with two processes a core and gains
nothing there: the process that would end the wait needs the core.

x86-64 only: a store to the counter is seen after the stores before it, as that processor promises. Others do not.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys

from tessera.core.errors import ConfigError, Conflict

_SYS_FUTEX = 202  # x86-64
_WAIT, _WAKE = 0, 1
_EVERYBODY = 2**31 - 1
_MASK = 2**32 - 1

_syscall = ctypes.CDLL(None).syscall
_syscall.restype = ctypes.c_long


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def check_platform() -> None:
    """Raises ConfigError where the counters would not work."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        found = f"it needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
        raise ConfigError([Conflict(("shared-memory collectives",), found, "Use gloo")])


class Counter:
    """Four bytes of `memory` at `offset`. One process adds, any number of others wait until it has come far enough.

    It counts modulo 2**32: a waiter may be at most 2**31 away.
    """

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._word = ctypes.c_uint32.from_buffer(memory, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._word))

    def set(self, count: int) -> None:
        """Moves on to `count` and wakes who waits."""
        self._word.value = count & _MASK
        _syscall(_SYS_FUTEX, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def reached(self, count: int) -> bool:
        """Whether it stands at `count` or past it."""
        return (self._word.value - count) & _MASK < 2**31

    def wait(self, count: int, seconds: float) -> bool:
        """Sleeps until `count` is reached, but no longer than `seconds` (under one), and maybe less: says whether."""
        seen = self._word.value
        if (seen - count) & _MASK < 2**31:
            return True
        limit = _TimeSpec(0, int(seconds * 1e9))
        _syscall(_SYS_FUTEX, self._address, _WAIT, seen, ctypes.byref(limit), None, 0)
        return self.reached(count)
