"""An engine's end of the wire to its ranks: one socket for all, the processes behind it, and why one has gone."""

from __future__ import annotations

import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from tessera.core.errors import CapacityError, ConfigError, Conflict, DeadlineError, ModelError, PeerError, TesseraError
from tessera.run.children import Children
from tessera.run.hosts import Placed, misplaced
from tessera.run.nodes import start
from tessera.run.wire import Down, End, Failed, Hello, Up, decode_up, encode, watched

GATHER_S = 0.5  # after the first bad news, for the news that explain it
TELL_MS = 500
# Errors that say what is wrong; other ones of a rank are told by their name.
OF_OTHERS = (PeerError.__name__, DeadlineError.__name__)
PLAIN = {kind.__name__: kind for kind in (CapacityError, ModelError)}


class Hub:
    """Starts ranks and talks to them. Only one thread may use it.

    `meeting`: host:port of this host at which ranks of other hosts find it, `here`: how this one was started. Raises
    `ConfigError` when it is in use.
    """

    def __init__(self, num_ranks: int, meeting: str | None = None, here: Placed | None = None) -> None:
        self.num_ranks = num_ranks
        self._here = here
        self._names: dict[int, bytes] = {}  # by which ranks are known to the socket
        self._placed: dict[int, Placed] = {}  # hosts of ranks of other hosts
        self._refused: tuple[Conflict, ...] = ()
        self._turned_away: list[bytes] = []
        self._have_met = False
        self._folder = Path(tempfile.mkdtemp(prefix="tessera-"))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.router_mandatory = True
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._children: Children | None = None
        self._ranks: list[int] = []  # those of this host
        self._told: dict[int, Failed] = {}
        self._also: int | None = None  # a file that is waited for too
        self._gone = watched(self._socket)
        self._poller.register(self._gone, zmq.POLLIN)
        self._socket.bind(self.address)
        if meeting is not None:
            self._open(meeting)

    def _open(self, meeting: str) -> None:
        host, _, port = meeting.rpartition(":")
        try:
            self._socket.bind(f"tcp://{socket.gethostbyname(host)}:{port}")
        except (zmq.ZMQError, OSError) as error:
            self.close(0.0)
            flag, remedy = f"--dist-init-addr {meeting}", "Give a free port of the first host, the same on every host."
            raise ConfigError([Conflict((flag,), f"cannot listen there: {error}", remedy)]) from error

    @property
    def address(self) -> str:
        """Where ranks of this host connect: in a folder that only their user may enter."""
        return f"ipc://{self._folder}/ranks"

    def start(self, ranks: Sequence[int], devices: Sequence[int], folder: str, listening: int) -> None:
        """Starts the processes of `ranks`; the first inherits `listening` where it is rank 0."""
        self._ranks = list(ranks)
        self._children = start(self.address, ranks, devices, folder, listening=listening)
        for end in self._children.ends:
            self._poller.register(end, zmq.POLLIN)

    def met(self) -> None:
        """All are connected: nothing needs the folder, and nobody shall have to clear it away."""
        self._have_met = True
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, message: Down, ranks: Sequence[int]) -> None:
        """Sends without waiting. Raises why a rank has gone."""
        data = encode(message)
        for rank in ranks:
            try:
                self._socket.send_multipart([self._name(rank), data])
            except zmq.ZMQError as error:
                raise self._why(f"rank {rank} cannot be reached") from error

    def receive(self, seconds: float, also: int | None = None) -> tuple[int, Up] | None:
        """The next message and whose it is; None when none comes in time, or before the file `also` is readable.

        Raises why a rank has failed or gone.
        """
        self._listen(also)
        until = time.monotonic() + seconds
        while True:
            ready = dict(self._poller.poll(int(max(until - time.monotonic(), 0) * 1000)))
            if not ready.keys() - {also}:
                return None
            if self._socket not in ready:
                raise self._why("a rank has gone")
            found = self._read()
            if found is not None and not isinstance(found[1], Failed):
                return found
            if found is not None:
                raise self._why("a rank has gone")

    def _listen(self, also: int | None) -> None:
        if also == self._also:
            return
        if self._also is not None:
            self._poller.unregister(self._also)
        if also is not None:
            self._poller.register(also, zmq.POLLIN)
        self._also = also

    def _place(self, rank: int, name: bytes, there: Placed) -> None:
        """A rank of another host has come. Where that was started as it cannot be it is turned away; while the ranks
        meet that raises `ConfigError`, and all are told."""
        found = misplaced(there, self._here, self._placed.get(rank)) if self._here is not None else []
        if not found:
            self._placed[rank], self._names[rank] = there, name
            return
        self._turned_away.append(name)
        if not self._have_met:
            self._refused = tuple(found)
            raise ConfigError(found)
        self._tell_end(name, tuple(found))

    def _read(self) -> tuple[int, Up] | None:
        """None: somebody said it who was turned away."""
        name, data = self._socket.recv_multipart()
        rank, message = int(name.partition(b"/")[0]), decode_up(data)
        if isinstance(message, Hello) and message.placed is not None:
            self._place(rank, name, message.placed)
        if name != self._name(rank):
            return None
        if isinstance(message, Failed):
            self._told.setdefault(rank, message)
        return rank, message

    def _why(self, first: str) -> TesseraError:
        """What is wrong: what a rank said of itself; else how one ended; else which have gone elsewhere; else what one
        says of others."""
        until = time.monotonic() + GATHER_S
        while (left := until - time.monotonic()) > 0 and not self._causes():
            if self._socket.poll(int(left * 1000) + 1):
                self._read()
        ended = {rank: how for rank, how in self._ended().items() if rank not in self._told}
        if ended and not self._causes():
            return PeerError("; ".join(f"rank {rank} {how}" for rank, how in ended.items()))
        if not self._causes() and (lost := self._lost()):
            return PeerError(f"ranks {lost} on other hosts have gone, or cannot be reached")
        told = self._causes() or self._told
        if not told:
            return PeerError(first)
        rank, failed = min(told.items())
        if failed.conflicts:
            return ConfigError(list(failed.conflicts))
        kind = PLAIN.get(failed.kind)
        return kind(failed.error) if kind else PeerError(f"rank {rank}: {failed.kind}: {failed.error}")

    def _lost(self) -> list[int]:
        """Ranks of other hosts that said nothing of themselves and are not there."""
        elsewhere = set(range(self.num_ranks)) - set(self._ranks) - self._told.keys()
        return [rank for rank in sorted(elsewhere) if not self._reaches(rank)]

    def _reaches(self, rank: int) -> bool:
        """Whether a rank is connected; it is told the end."""
        return self._tell_end(self._name(rank), self._refused)

    def _tell_end(self, name: bytes, why: tuple[Conflict, ...]) -> bool:
        try:
            self._socket.send_multipart([name, encode(End(why))], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _name(self, rank: int) -> bytes:
        return self._names.get(rank, str(rank).encode())

    def _causes(self) -> dict[int, Failed]:
        """What ranks say that is not about others."""
        return {rank: failed for rank, failed in self._told.items() if failed.kind not in OF_OTHERS}

    def _ended(self) -> dict[int, str]:
        ended = self._children.ended() if self._children is not None else {}
        return {self._ranks[i]: how for i, how in ended.items()}

    def close(self, seconds: float) -> None:
        """Tells all the end, waits up to `seconds` for them to end, and ends them. May be called again."""
        if self._socket.closed:
            return
        for rank in range(self.num_ranks):
            self._reaches(rank)
        for name in self._turned_away:
            self._tell_end(name, self._refused)
        if self._children is not None:
            self._children.close(seconds)
        self._socket.disable_monitor()
        self._gone.close(0)
        self._socket.close(TELL_MS)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
