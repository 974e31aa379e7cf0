"""What two sides of a transfer engine say to each other: msgpack messages of known length on a stream socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator

import msgspec

from tessera.core.errors import PeerError

PROTOCOL = 2
_LENGTH = struct.Struct("<I")
_MOST = 1 << 30
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: pid, user, group
_TAKEN = 1 << 16


class Endpoint(msgspec.Struct, frozen=True):
    """How to reach a reader. `address`: HOST:PORT, or @NAME of a socket of this host. `sizes`: bytes of its regions."""

    kind: str
    protocol: int
    name: str
    address: str
    sizes: dict[int, int]


class Hello(msgspec.Struct, tag=True):
    """A writer's first word: who it is, whom it wants, and what the reader needs to read its regions."""

    protocol: int
    kind: str
    name: str
    to: str
    sizes: dict[int, int]
    exported: bytes


class Welcome(msgspec.Struct, tag=True):
    """The reader's answer; with an error it closes after it."""

    error: str | None = None


class Batch(msgspec.Struct, tag=True):
    """Copies that the reader is asked for; `runs`: int64, column by column."""

    ticket: int
    runs: bytes


class Landed(msgspec.Struct, tag=True):
    """A batch is over."""

    ticket: int
    error: str | None = None


class Parting(msgspec.Struct, tag=True):
    """The reader takes nothing more from this writer."""

    reason: str


Message = Hello | Welcome | Batch | Landed | Parting
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


def listen(host: str | None, name: str) -> tuple[socket.socket, str]:
    """A listening socket and its address: of this host alone under `name` (no file), or of the interface `host`."""
    if host is None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen()
        return listener, f"@{name}"
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return listener, f"{host}:{listener.getsockname()[1]}"


def dial(address: str, timeout_s: float) -> socket.socket:
    """A connection. `OSError` when nobody is there."""
    if address.startswith("@"):
        found = socket.socket(socket.AF_UNIX)
        found.settimeout(timeout_s)
        try:
            found.connect(f"\0{address[1:]}")
        except OSError:
            found.close()
            raise
        return found
    host, _, port = address.rpartition(":")
    found = socket.create_connection((host, int(port)), timeout_s)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def same_user(sock: socket.socket) -> bool:
    """Whether the other end of a socket of this host belongs to this user, or to root. True for TCP: it cannot tell."""
    if sock.family != socket.AF_UNIX:
        return True
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user in (0, os.getuid())


def still_there(sock: socket.socket) -> bool:
    """Whether the other end has not closed."""
    readable, _, _ = select.select([sock], [], [], 0)
    return not readable or sock.recv(1, socket.MSG_PEEK) != b""


def pack(message: Message) -> bytes:
    """A message as it goes over the wire."""
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


class Inbox:
    """Cuts what comes from a socket into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def take(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. `PeerError` for what is none."""
        self._data += data
        while len(self._data) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data)
            end = _LENGTH.size + length
            if length > _MOST:
                raise PeerError(f"a message of {length} bytes announced, at most {_MOST} are taken")
            if len(self._data) < end:
                return
            try:
                with memoryview(self._data)[_LENGTH.size : end] as body:
                    message = _decoder.decode(body)
            except msgspec.DecodeError as error:
                raise PeerError(f"not a message of transfer protocol {PROTOCOL}: {error}") from error
            del self._data[:end]
            yield message


class Heard:
    """What comes from a socket, message by message, until the other side closes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._inbox, self._found = Inbox(), deque[Message]()
        self._ended = False

    def next(self) -> Message | None:
        """Waits as long as the socket's timeout says; None when the other side has closed."""
        while not self._found and not self._ended:
            self._take(0)
        return self._found.popleft() if self._found else None

    def ready(self) -> bool:
        """Whether `next` would answer at once."""
        with contextlib.suppress(BlockingIOError):
            while not self._found and not self._ended:
                self._take(socket.MSG_DONTWAIT)
        return bool(self._found) or self._ended

    def _take(self, flags: int) -> None:
        data = self._sock.recv(_TAKEN, flags)
        self._ended = not data
        self._found.extend(self._inbox.take(data))


class Channel:
    """The writer's end: nothing of it blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._inbox = Inbox()
        self._out = bytearray()

    def send(self, message: Message) -> None:
        """Hands over a message; what the socket does not take now goes with a later `exchange`."""
        self._out += pack(message)
        self._flush()

    @property
    def file(self) -> int:
        """The socket's number."""
        return self._sock.fileno()

    @property
    def full(self) -> bool:
        """The socket has not taken everything yet."""
        return bool(self._out)

    def exchange(self) -> tuple[list[Message], bool]:
        """What has come, and whether the other side is still there."""
        found: list[Message] = []
        try:
            self._flush()
            while data := self._sock.recv(_TAKEN):
                found += self._inbox.take(data)
                if len(data) < _TAKEN:
                    return found, True
        except BlockingIOError:
            return found, True
        except (OSError, PeerError):
            return found, False
        return found, False

    def _flush(self) -> None:
        while self._out:
            try:
                del self._out[: self._sock.send(self._out)]
            except BlockingIOError:
                return
            except OSError:  # the other side has gone: `exchange` will say so
                self._out.clear()

    def close(self) -> None:
        self._sock.close()
