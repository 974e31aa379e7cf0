"""Child processes that end with this one, however it ends; started, watched, and never left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
WIRES = "tessera-{}-"  # how the folder begins in which ranks meet a process of this number: somebody else may clear it
START_S = 60.0
KILLED_S = 10.0


def die_with(parent: int) -> None:
    """The kernel kills this process when the thread that started it ends, and so when its parent `parent` does.

    If that has happened already the end is the same: there is nobody left to tell anything.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", maybe because memory ran out" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


class Children:
    """Processes with sessions of their own, so that Ctrl-C in a terminal does not reach them.

    A thread that lives as long as they do starts them: to `die_with`, the end of the thread is the end of the parent.
    `files`: for each command the descriptors that it inherits.
    """

    def __init__(self, commands: Sequence[Sequence[str]], files: Sequence[Sequence[int]]) -> None:
        self._over = threading.Event()
        started: Future[list[subprocess.Popen[bytes]]] = Future()
        arguments = (commands, files, started)
        self._keeper = threading.Thread(target=self._keep, args=arguments, name="tessera-children", daemon=True)
        self._keeper.start()
        self._processes = started.result(START_S)
        self.ends = [os.pidfd_open(process.pid) for process in self._processes]

    def _keep(
        self,
        commands: Sequence[Sequence[str]],
        files: Sequence[Sequence[int]],
        started: Future[list[subprocess.Popen[bytes]]],
    ) -> None:
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, kept in zip(commands, files, strict=True):
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=kept)
                processes.append(process)
        except BaseException as error:
            _kill(processes)
            started.set_exception(error)
            return
        started.set_result(processes)
        self._over.wait()

    def ended(self, badly: bool = False) -> dict[int, str]:
        """Which have ended, by their place among the commands, and how; `badly`: but those with exit code 0."""
        codes = {i: process.poll() for i, process in enumerate(self._processes)}
        return {
            i: f"(process {self._processes[i].pid}) {how_it_ended(code)}"
            for i, code in codes.items()
            if code is not None and not (badly and code == 0)
        }

    def wait(self, seconds: float) -> None:
        """Waits up to `seconds` for all to end."""
        ends, until = select.poll(), time.monotonic() + seconds
        for end in self.ends:
            ends.register(end, select.POLLIN)
        running = len(self.ends)
        while running and (left := until - time.monotonic()) > 0:
            for end, _ in ends.poll(left * 1000):
                ends.unregister(end)
                running -= 1

    def close(self, seconds: float = 0.0) -> None:
        """Waits up to `seconds` for all to end, then ends them. May be called again."""
        self.wait(seconds)
        _kill(self._processes)
        while self.ends:
            os.close(self.ends.pop())
        self._over.set()
        self._keeper.join(KILLED_S)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel still clears it away
            process.wait(KILLED_S)
