"""The engine process as the front sees it: started, spoken to, watched, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import zmq

from tessera.run.children import KILLED_S, WIRES, how_it_ended
from tessera.serve.wire import Downward, Upward, addresses, decode_up, encode

WORKER = (sys.executable, "-P", "-m", "tessera.serve.worker")
LOOK_S = 0.25  # how soon an end is noticed


class EngineProcess:
    """One engine process. `command` gets the folder of the wire and our process id. Needs a running event loop.

    It has a session of its own, so that Ctrl-C in a terminal reaches only the front, which decides what happens.
    """

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tessera-"))
        self._context = zmq.Context()
        self._down, self._up = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._down.set_hwm(0)
        down, up = addresses(self._folder)
        self._down.connect(down)  # the side that connects may send before the other is there
        self._up.bind(up)
        self._met = self._killed = False
        self._process = subprocess.Popen(
            [*command, str(self._folder), str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: Downward) -> None:
        """Sends without waiting."""
        self._down.send(encode(message), zmq.NOBLOCK)

    async def receive(self) -> Upward | None:
        """The next message; None when the process has ended or was killed, and all that it said is read."""
        while not self._there():
            over = self._killed or self._process.poll() is not None
            if not await self._woken() and over and not self._there():
                return None
        message: Upward = decode_up(self._up.recv(zmq.NOBLOCK))
        if not self._met:  # both ends are connected: nothing needs the folder, and nobody shall have to clear it away
            self._met = True
            shutil.rmtree(self._folder, ignore_errors=True)
        return message

    def _there(self) -> bool:
        """A message can be read. Whoever has asked is woken by what comes later, and not before (see ZMQ_FD)."""
        return bool(int(self._up.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    async def _woken(self) -> bool:
        """Something may have come; False: nothing has, for `LOOK_S`. Sockets of `zmq.asyncio` take twice as long."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        file = int(self._up.getsockopt(zmq.FD))
        loop.add_reader(file, woken.set)
        try:
            async with asyncio.timeout(LOOK_S):
                await woken.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(file)
        return True

    def end(self) -> str:
        """How it ended, for people."""
        code, runs = self._process.poll(), "was killed and has not ended" if self._killed else "runs"
        return f"the engine process {runs if code is None else how_it_ended(code)}"

    def kill(self) -> None:
        """Ends it at once and removes what it leaves: also the folder in which its ranks had yet to meet it. Once, for
        its number may be another's later. One that is inside a driver may not end: nobody waits for it any more."""
        if self._killed:
            return
        self._killed = True
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_S)
        for folder in (self._folder, *self._folder.parent.glob(f"{WIRES.format(self.pid)}*")):
            shutil.rmtree(folder, ignore_errors=True)

    async def ended(self, seconds: float) -> bool:
        """Waits for its end; False when it still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, seconds)
        return self._process.poll() is not None

    def close(self) -> None:
        """Ends it, if it still runs, and closes the wire. May be called again."""
        self.kill()
        self._down.close(0)
        self._up.close(0)
        self._context.term()
