"""An engine's end of the wire to its ranks: one socket for all, the processes behind it, and why one has gone."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from tessera.core.errors import CapacityError, ConfigError, Conflict, DeadlineError, ModelError, PeerError, TesseraError
from tessera.run.children import WIRES, Children
from tessera.run.hosts import Placed, misplaced
from tessera.run.nodes import start
from tessera.run.wire import Down, End, Failed, Hello, Look, Up, decode_up, encode, watched

GATHER_S = 0.5  # after the first bad news, for the news that explain it
LOOK_S = 0.05  # between two looks at who is there, once somebody has left
TELL_MS = 500
NAME = re.compile(rb"(\d+)(/[0-9a-f]+)?")  # as `Link` makes it; strangers may call themselves anything
# Errors that say what is wrong; other ones of a rank are told by their name.
OF_OTHERS = (PeerError.__name__, DeadlineError.__name__)
PLAIN = {kind.__name__: kind for kind in (CapacityError, ModelError)}
log = logging.getLogger(__name__)


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
        self._folder = Path(tempfile.mkdtemp(prefix=WIRES.format(os.getpid())))
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.router_mandatory = True
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._children: Children | None = None
        self._ranks: list[int] = []  # those of this host
        self._nearest: set[int] = set()  # files that are readable once they have ended
        self._told: dict[int, Failed] = {}
        self._heard: set[int] = set()
        self._doubt: float | None = None  # until when it is looked who has left
        self._look_at = 0.0
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
        self._nearest = set(self._children.ends)
        for end in self._nearest:
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
                raise self.why(PeerError(f"rank {rank} cannot be reached")) from error

    def receive(self, seconds: float, also: int | None = None) -> tuple[int, Up] | None:
        """The next message and whose it is; None when none comes in time, or before the file `also` is readable.

        Raises why a rank has failed or gone.
        """
        self._listen(also)
        until = time.monotonic() + seconds
        while True:
            end = until if self._doubt is None else min(until, self._look_at)
            ready = dict(self._poller.poll(int(max(end - time.monotonic(), 0) * 1000)))
            if self._gone in ready:
                self._somebody_left()
            found = self._read() if self._socket in ready else None
            if found is not None and not isinstance(found[1], Failed):
                return found
            if found is not None or self._nearest & ready.keys() or self._lost_by_now():
                raise self.why(PeerError("a rank has gone"))
            if also in ready or time.monotonic() >= until:
                return None

    def _somebody_left(self) -> None:
        """A connection has ended. Whose is not said, so it is looked for a while who is there: the socket may be told
        later than we are. Ranks that are not in their places, and strangers, may leave as they like."""
        while self._gone.poll(0):
            self._gone.recv_multipart()
        self._look_at = time.monotonic()
        self._doubt = self._look_at + GATHER_S

    def _lost_by_now(self) -> bool:
        """Whether a rank has left, where there is reason to doubt it."""
        now = time.monotonic()
        if self._doubt is None or now < self._look_at:
            return False
        self._look_at, self._doubt = now + LOOK_S, self._doubt if now < self._doubt else None
        return bool(self._lost())

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
        if not self._have_met:
            self._turned_away.append(name)
            self._refused = tuple(found)
            raise ConfigError(found)
        log.warning("%s comes too late and is turned away: %s", there.where, "; ".join(map(str, found)))
        self._tell(name, End(tuple(found)))

    def _read(self) -> tuple[int, Up] | None:
        """None: somebody said it who is none of ours."""
        name, *rest = self._socket.recv_multipart()
        if (called := NAME.fullmatch(name)) is None:
            return None
        rank = int(called[1])
        try:
            message: Up = decode_up(b"".join(rest))
        except msgspec.DecodeError as error:
            if rank not in self._heard or name != self._name(rank):
                return None
            raise PeerError(f"rank {rank} said what cannot be read: {error}") from error
        if isinstance(message, Hello) and message.placed is not None:
            self._place(rank, name, message.placed)
        if rank >= self.num_ranks or name != self._name(rank):
            return None
        self._heard.add(rank)
        if isinstance(message, Failed):
            self._told.setdefault(rank, message)
        return rank, message

    def why(self, first: TesseraError) -> TesseraError:
        """What is wrong: what a rank said of itself; else how one ended; else which have gone elsewhere; else what one
        says of others; else what was noticed `first`."""
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
            return first
        rank, failed = min(told.items())
        if failed.conflicts:
            return ConfigError(list(failed.conflicts))
        kind = PLAIN.get(failed.kind)
        return kind(failed.error) if kind else PeerError(f"rank {rank}: {failed.kind}: {failed.error}")

    def _lost(self) -> list[int]:
        """Ranks of other hosts that were there, did not say why they leave, and are not there any more."""
        elsewhere = self._heard - set(self._ranks) - self._told.keys()
        return [rank for rank in sorted(elsewhere) if not self._tell(self._name(rank), Look())]

    def _tell(self, name: bytes, message: Down) -> bool:
        """Sends without waiting; False when nobody of that name is connected."""
        try:
            self._socket.send_multipart([name, encode(message)], zmq.NOBLOCK)
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
        for name in (*map(self._name, range(self.num_ranks)), *self._turned_away):
            self._tell(name, End(self._refused))
        if self._children is not None:
            self._children.close(seconds)
        self._socket.disable_monitor()
        self._gone.close(0)
        self._socket.close(TELL_MS)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
