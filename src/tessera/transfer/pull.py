"""The engine behind all ways to move bytes between processes: **the side that is written does the copying**.

The writer's `write` is a request on a socket; a thread of the reader, one for each writer, copies from the writer's
memory and acknowledges. So `fence` is a matter of this process alone: the thread stops, and what it had begun is over
or torn down before `fence` returns, whether the writer lives, hangs or is dead. A peer that wrote by itself could be
stopped by its own consent only. What copies is a `Mover`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import count

import msgspec
import numpy as np
import torch
from torch import Tensor

from tessera.core.errors import DeadlineError, PeerError, TesseraError
from tessera.transfer.base import FENCE_S, Done, Runs, check_runs
from tessera.transfer.mover import Mover, Source
from tessera.transfer.wire import (
    PROTOCOL,
    Batch,
    Channel,
    Endpoint,
    Hello,
    Landed,
    Message,
    Parting,
    Welcome,
    dial,
    listen,
    messages,
    pack,
    same_user,
    still_there,
)

HELLO_S = 10.0  # from the connection to the first word
SAY_S = 5.0  # a word to a writer that does not listen


class PullEngine:
    """See `Engine`. One thread may call it; the copying is done by threads of its own."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self._name = f"{mover.kind}-{os.getpid()}-{secrets.token_hex(8)}"
        self._regions: dict[int, Tensor] = {}
        self._readers = _Readers(self._name, mover, self._regions)
        self._peers: dict[str, _Peer] = {}
        self._over: deque[Done] = deque()
        self._tickets = count()

    @property
    def name(self) -> str:
        """See `Engine.name`."""
        return self._name

    def register(self, region: int, memory: Tensor) -> None:
        """See `Engine.register`."""
        if not memory.is_contiguous():
            raise ValueError(f"region {region}: only contiguous memory can be registered")
        self._regions[region] = memory.view(-1).view(torch.uint8)

    def endpoint(self) -> bytes:
        """See `Engine.endpoint`. Opens the door at the first call."""
        address = self._readers.open_door()
        return msgspec.msgpack.encode(Endpoint(self._mover.kind, PROTOCOL, self._name, address, self._sizes()))

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        """See `Engine.connect`."""
        try:
            there = msgspec.msgpack.decode(endpoint, type=Endpoint)
        except msgspec.DecodeError as error:
            raise PeerError(f"not the endpoint of a transfer engine: {error}") from error
        if (there.kind, there.protocol) != (self._mover.kind, PROTOCOL):
            found = f"{there.name} is {there.kind} with protocol {there.protocol}"
            raise PeerError(f"{found}, this side {self._mover.kind} with {PROTOCOL}")
        if (old := self._peers.pop(there.name, None)) is not None:
            self._over += old.fail(PeerError(f"connected to {there.name} anew"))
        hello = Hello(
            PROTOCOL, self._mover.kind, self._name, there.name, self._sizes(), self._mover.export(self._regions)
        )
        self._peers[there.name] = _Peer(there, _greet(there, hello, deadline_s))
        return there.name

    def write(self, peer: str, runs: Runs) -> int:
        """See `Engine.write`."""
        if (found := self._peers.get(peer)) is None:
            raise ValueError(f"'{peer}' is no peer; connected: {sorted(self._peers)}")
        check_runs(runs, self._sizes(), found.endpoint.sizes)
        ticket = next(self._tickets)
        found.post(ticket, runs)
        return ticket

    def poll(self) -> list[Done]:
        """See `Engine.poll`."""
        for peer in self._peers.values():
            self._over += peer.poll()
        done = list(self._over)
        self._over.clear()
        return done

    def wait(self, also: int | None, seconds: float | None) -> None:
        """See `Engine.wait`."""
        if self._over or any(peer.failed for peer in self._peers.values()):
            return
        poller = select.poll()
        for peer in self._peers.values():
            peer.watch(poller)
        if also is not None:
            poller.register(also, select.POLLIN)
        poller.poll(None if seconds is None else 1000 * max(seconds, 0))

    def fence(self, writer: str, deadline_s: float = FENCE_S) -> None:
        """See `Engine.fence`."""
        self._readers.fence(writer, deadline_s)

    def close(self) -> None:
        """See `Engine.close`."""
        for peer in self._peers.values():
            self._over += peer.fail(PeerError(f"{self._name} has left"))
        self._readers.close()
        self._mover.close()

    def _sizes(self) -> dict[int, int]:
        return {number: memory.numel() for number, memory in self._regions.items()}


def _greet(there: Endpoint, hello: Hello, deadline_s: float) -> socket.socket:
    """A connection on which the reader has said welcome."""
    deadline = time.monotonic() + deadline_s
    try:
        sock = dial(there.address, deadline_s)
    except TimeoutError as error:
        raise DeadlineError(f"{there.name} at {there.address} did not answer within {deadline_s} s") from error
    except OSError as error:
        raise PeerError(f"{there.name} cannot be reached at {there.address}: {error}") from error
    try:
        sock.sendall(pack(hello))
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        answer = next(messages(sock), Parting("it closed the connection"))
    except TimeoutError as error:
        sock.close()
        raise DeadlineError(f"{there.name} did not say welcome within {deadline_s} s") from error
    except OSError as error:
        sock.close()
        raise PeerError(f"{there.name} left while it was greeted: {error}") from error
    if answer != Welcome():
        sock.close()
        reason = answer.error if isinstance(answer, Welcome) else getattr(answer, "reason", answer)
        raise PeerError(f"{there.name} refuses: {reason}")
    return sock


class _Peer:
    """A reader as its writer sees it."""

    def __init__(self, endpoint: Endpoint, sock: socket.socket) -> None:
        self.endpoint = endpoint
        self._channel = Channel(sock)
        self._pending: set[int] = set()
        self._gone: PeerError | None = None

    def post(self, ticket: int, runs: Runs) -> None:
        """Asks the reader for the copies."""
        self._pending.add(ticket)
        if self._gone is None:
            self._channel.send(Batch(ticket, np.ascontiguousarray(runs, np.int64).tobytes()))

    def poll(self) -> list[Done]:
        """What is over since the last call."""
        if self._gone is not None:
            return self.fail(self._gone)
        found, there = self._channel.exchange()
        done = [self._landed(message) for message in found if isinstance(message, Landed)]
        reasons = [message.reason for message in found if isinstance(message, Parting)]
        if reasons or not there:
            done += self.fail(PeerError(f"{self.endpoint.name} {reasons[0] if reasons else 'has left'}"))
        return done

    @property
    def failed(self) -> bool:
        """Some batches are over because the peer has gone."""
        return self._gone is not None and bool(self._pending)

    def watch(self, poller: select.poll) -> None:
        """Has `poller` wait for what the peer says, and for when it takes what was not sent yet."""
        if self._gone is None:
            poller.register(self._channel.file, select.POLLIN | (select.POLLOUT if self._channel.full else 0))

    def _landed(self, message: Landed) -> Done:
        self._pending.discard(message.ticket)
        error = None if message.error is None else PeerError(f"{self.endpoint.name}: {message.error}")
        return Done(message.ticket, error)

    def fail(self, error: PeerError) -> list[Done]:
        """Gives the peer up; all that is under way has failed."""
        self._gone = error
        self._channel.close()
        done = [Done(ticket, error) for ticket in sorted(self._pending)]
        self._pending.clear()
        return done


class _Writer:
    """A writer as its reader sees it. `stop`: take nothing more from it; `quiet`: nothing of it lands any more."""

    def __init__(self, hello: Hello, sock: socket.socket, source: Source) -> None:
        self.hello, self._sock, self._source = hello, sock, source
        self.stop, self.quiet = threading.Event(), threading.Event()

    def retire(self, deadline_s: float) -> bool:
        """Takes nothing more from it; True when nothing of it lands any more."""
        self.stop.set()
        with contextlib.suppress(OSError):  # it may have closed already
            self._sock.shutdown(socket.SHUT_RD)
        return self.quiet.wait(deadline_s)

    def serve(self, heard: Iterator[Message], own: dict[int, Tensor]) -> str:
        """Copies until the writer leaves, is fenced or fails; says why it ended. Nothing lands afterwards."""
        sizes = {number: memory.numel() for number, memory in own.items()}
        try:
            self.say(Welcome())
            for message in heard:
                if not self.stop.is_set() and isinstance(message, Batch):
                    error = self._copy(message, sizes)
                    self.say(Landed(message.ticket, error))
                    if error is None:
                        continue
                    return f"gives this side up: {error}"
                break
            return "has fenced this side"
        finally:
            self._source.close()
            self.quiet.set()

    def _copy(self, batch: Batch, sizes: dict[int, int]) -> str | None:
        try:
            runs = np.frombuffer(batch.runs, np.int64).reshape(-1, 5)
            check_runs(runs, self.hello.sizes, sizes)
            self._source.copy(runs, self.stop)
        except (PeerError, ValueError) as error:
            return str(error)
        return "fenced meanwhile" if self.stop.is_set() else None

    def say(self, message: Message) -> None:
        """Waits a while for a writer that does not listen, then gives it up (`OSError`)."""
        self._sock.settimeout(SAY_S)
        self._sock.sendall(pack(message))
        self._sock.settimeout(None)


class _Readers:
    """The reader's side: a door, and a thread for each writer that came through it."""

    def __init__(self, name: str, mover: Mover, regions: dict[int, Tensor]) -> None:
        self._name, self._mover, self._regions = name, mover, regions
        self._writers: dict[str, _Writer] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._door: tuple[socket.socket, str] | None = None
        self._connections: list[tuple[socket.socket, threading.Thread]] = []
        self._closed = False

    def open_door(self) -> str:
        """Listens; gives the address."""
        if self._door is None:
            self._door = listen(self._mover.host, self._name)
            threading.Thread(target=self._accept, name=f"{self._name} door", daemon=True).start()
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
            heard = messages(sock)
            try:
                writer = self._admit(next(heard, None), sock)
            except (TesseraError, msgspec.DecodeError) as error:
                sock.sendall(pack(Welcome(str(error))))
                return
            try:
                reason = writer.serve(heard, self._regions)
            finally:
                self._forget(writer)
            writer.say(Parting("has left" if self._closed else reason))

    def _admit(self, hello: Message | None, sock: socket.socket) -> _Writer:
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
            writer = _Writer(hello, sock, self._mover.open(hello.exported, self._regions))
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

    def _forget(self, writer: _Writer) -> None:
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
        with self._lock:
            writers = list(self._writers.values())
        for writer in writers:
            writer.retire(FENCE_S)
        until = time.monotonic() + FENCE_S
        for sock, thread in self._connections:
            with contextlib.suppress(OSError):  # one that has said nothing yet
                sock.shutdown(socket.SHUT_RD)
            thread.join(max(until - time.monotonic(), 0))
