"""The reader's end of `PullEngine`: a door, and a thread for each writer, which copies what that writer asks for."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np
from torch import Tensor

from tessera.core.errors import DeadlineError, PeerError, TesseraError
from tessera.transfer.base import FENCE_S, PerRegion, check_runs
from tessera.transfer.mover import Mover, Source, Wait
from tessera.transfer.wire import (
    PROTOCOL,
    Batch,
    Heard,
    Hello,
    Landed,
    Message,
    Parting,
    Welcome,
    listen,
    pack,
    same_user,
    still_there,
)

HELLO_S = 10.0  # from the connection to the first word
SAY_S = 5.0  # a word to a writer that does not listen
AHEAD = 2  # batches of a writer under way: the next begins when one ends, and the wire is not idle meanwhile
_TIME = struct.Struct("ll")  # a timeval: seconds and microseconds


def sizes_of(regions: dict[int, Tensor]) -> dict[int, int]:
    """Bytes of each region."""
    return {number: memory.numel() for number, memory in regions.items()}


class Writer:
    """A writer as its reader sees it. `stop`: take nothing more from it; `quiet`: nothing of it lands any more."""

    def __init__(self, hello: Hello, sock: socket.socket, source: Source) -> None:
        self.hello, self._sock, self._source = hello, sock, source
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(*divmod(int(1e6 * SAY_S), 10**6)))
        self.stop, self.quiet = threading.Event(), threading.Event()
        self._under_way: deque[tuple[int, Wait | None]] = deque()

    def retire(self, deadline_s: float) -> bool:
        """Takes nothing more from it; True when nothing of it lands any more."""
        self.stop.set()
        with contextlib.suppress(OSError):  # it may have closed already
            self._sock.shutdown(socket.SHUT_RD)
        return self.quiet.wait(deadline_s)

    def serve(self, heard: Heard, own: dict[int, Tensor]) -> str:
        """Copies until the writer leaves, is fenced or fails; says why it ended. Nothing lands afterwards."""
        sizes = PerRegion(self.hello.sizes, sizes_of(own))
        try:
            self.say(Welcome())
            while True:
                if self._under_way and (len(self._under_way) == AHEAD or not heard.ready()):
                    error = self._settle()
                elif isinstance(message := heard.next(), Batch) and not self.stop.is_set():
                    error = self._begin(message, sizes)
                else:
                    return "has fenced this side"
                if error is not None:
                    return f"gives this side up: {error}"
        finally:
            self._source.close()
            self.quiet.set()

    def _begin(self, batch: Batch, sizes: PerRegion) -> str | None:
        """Starts the copies of a batch; what is wrong with it, or with one before it."""
        try:
            runs = np.frombuffer(batch.runs, np.int64).reshape(5, -1).T
            check_runs(runs, sizes)
            wait = self._source.copy(runs, self.stop)
        except (PeerError, ValueError) as failure:
            wait = _failing(failure)
        self._under_way.append((batch.ticket, wait))
        return self._settle() if wait is None else None

    def _settle(self) -> str | None:
        """Waits for the oldest batch, and says that it is over; gives what is wrong with it."""
        ticket, wait = self._under_way.popleft()
        try:
            if wait is not None:
                wait()
            error = "fenced meanwhile" if self.stop.is_set() else None
        except (PeerError, ValueError) as failure:
            error = str(failure)
        self.say(Landed(ticket, error))
        return error

    def say(self, message: Message) -> None:
        """Waits a while for a writer that does not listen, then gives it up (`OSError`)."""
        self._sock.sendall(pack(message))


def _failing(error: Exception) -> Wait:
    def wait() -> None:
        raise error

    return wait


class Readers:
    """A door, and a thread for each writer that came through it."""

    def __init__(self, name: str, mover: Mover, regions: dict[int, Tensor]) -> None:
        self._name, self._mover, self._regions = name, mover, regions
        self._writers: dict[str, Writer] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._door: tuple[socket.socket, str] | None = None
        self._doorman: threading.Thread | None = None
        self._connections: list[tuple[socket.socket, threading.Thread]] = []
        self._closed = False

    def open_door(self) -> str:
        """Listens; gives the address."""
        if self._door is None:
            self._door = listen(self._mover.host, self._name)
            self._doorman = threading.Thread(target=self._accept, name=f"{self._name} door", daemon=True)
            self._doorman.start()
        return self._door[1]

    def _accept(self) -> None:
        assert self._door is not None
        while True:
            try:
                sock, _ = self._door[0].accept()
            except OSError:  # closed
                return
            thread = threading.Thread(target=self._receive, args=(sock,), name=f"{self._name} reader", daemon=True)
            thread.start()
            self._connections = [*(c for c in self._connections if c[1].is_alive()), (sock, thread)]

    def _receive(self, sock: socket.socket) -> None:
        """The life of a connection."""
        with sock, contextlib.suppress(OSError):  # a writer may leave at any moment
            sock.settimeout(HELLO_S)
            heard = Heard(sock)
            try:
                writer = self._admit(heard.next(), sock)
            except (TesseraError, msgspec.DecodeError) as error:
                sock.sendall(pack(Welcome(str(error))))
                return
            try:
                reason = writer.serve(heard, self._regions)
            except PeerError as failure:  # what it said is no message
                reason = f"gives this side up: {failure}"
            finally:
                self._forget(writer)
            writer.say(Parting("has left" if self._closed else reason))

    def _admit(self, hello: Message | None, sock: socket.socket) -> Writer:
        if not isinstance(hello, Hello) or (hello.protocol, hello.kind) != (PROTOCOL, self._mover.kind):
            raise PeerError(f"{self._name} is {self._mover.kind} with transfer protocol {PROTOCOL}")
        if hello.to != self._name:
            raise PeerError(f"{hello.to} is not here any more, here is {self._name}")
        if not same_user(sock):
            raise PeerError("the writer belongs to another user")
        with self._turn(hello.name, HELLO_S):
            if not still_there(sock):  # it did not wait for its turn, and may have come anew meanwhile
                raise PeerError(f"{hello.name} has left")
            self._retire(hello.name, HELLO_S)  # its earlier connection
            writer = Writer(hello, sock, self._mover.open(hello.exported, self._regions))
            with self._lock:
                self._writers[hello.name] = writer
        if self._closed:
            writer.retire(0)
        return writer

    @contextlib.contextmanager
    def _turn(self, name: str, deadline_s: float) -> Iterator[None]:
        """One connection of a writer is admitted at a time, and none while it is fenced."""
        with self._lock:
            turn = self._turns.setdefault(name, threading.Lock())
        if not turn.acquire(timeout=deadline_s):
            raise DeadlineError(f"{name} is still being admitted after {deadline_s} s: its memory is in doubt")
        try:
            yield
        finally:
            turn.release()

    def _forget(self, writer: Writer) -> None:
        with self._lock:
            if self._writers.get(writer.hello.name) is writer:
                del self._writers[writer.hello.name]

    def fence(self, name: str, deadline_s: float) -> None:
        """See `Engine.fence`. A connection that is being admitted is fenced too."""
        until = time.monotonic() + deadline_s
        with self._turn(name, deadline_s):
            self._retire(name, max(until - time.monotonic(), 0))

    def _retire(self, name: str, deadline_s: float) -> None:
        with self._lock:
            writer = self._writers.get(name)
        if writer is not None and not writer.retire(deadline_s):
            raise DeadlineError(
                f"a copy from {name} is still under way after {deadline_s:.3g} s: its memory is in doubt"
            )

    def close(self) -> None:
        """Takes nothing more from anybody. A thread still inside a library would abort a process that ends."""
        self._closed = True
        if self._door is not None:
            with contextlib.suppress(OSError):  # wakes `accept`
                self._door[0].shutdown(socket.SHUT_RDWR)
            self._door[0].close()
        if self._doorman is not None:
            self._doorman.join(FENCE_S)
        with self._lock:
            writers = list(self._writers.values())
        for writer in writers:
            writer.retire(FENCE_S)
        until = time.monotonic() + FENCE_S
        for sock, thread in self._connections:
            with contextlib.suppress(OSError):  # one that has said nothing yet
                sock.shutdown(socket.SHUT_RD)
            thread.join(max(until - time.monotonic(), 0))
