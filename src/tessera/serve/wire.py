"""The wire between the front process and the engine process: two ZeroMQ pipes over local sockets, messages by msgspec.

Besides the messages of `core/messages.py` there are those of the start: front -> engine `Begin`; engine -> front
`Starting` (the configuration is resolved), `Loading`, and `Refusal` (it cannot be).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tessera.core.config import Resolved
from tessera.core.errors import Conflict, PeerError
from tessera.core.messages import Inbound, Outbound

UNREAD = 1 << 17  # messages of the engine that a front may leave unread
LINGER_MS = 2000  # what is still to be sent when an end closes


class Starting(msgspec.Struct, tag=True, frozen=True):
    """The configuration is resolved and the model found; loading begins. `vocab_size`: ids without padding."""

    resolved: Resolved
    folder: str
    vocab_size: int


class Begin(msgspec.Struct, tag=True, frozen=True):
    """What to start: flags in any spelling, and the environment. `known`: what another engine of the same server made
    of them, which is not to be resolved anew. `replica`: which of several this is."""

    asked: dict[str, Any]
    environ: dict[str, str]
    known: Starting | None = None
    replica: int = 0


class Loading(msgspec.Struct, tag=True, frozen=True):
    """`done` of `total` elements of the weights are there."""

    done: int
    total: int


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """What was asked cannot be started."""

    conflicts: tuple[Conflict, ...]


Downward = Begin | Inbound
Upward = Starting | Loading | Refusal | Outbound

encode = msgspec.msgpack.Encoder().encode
decode_down = msgspec.msgpack.Decoder(Downward).decode
decode_up = msgspec.msgpack.Decoder(Upward).decode


def addresses(folder: Path) -> tuple[str, str]:
    """Addresses of the pipes (down to the engine, up to the front) in a folder that only their user may enter."""
    return f"ipc://{folder}/down", f"ipc://{folder}/up"


class EngineEnd:
    """The engine's end. `tell` may be called from any thread, `hear` from one."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context()
        self._down, self._up = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        self._down.set_hwm(0)
        self._up.set_hwm(UNREAD)
        self._up.linger = LINGER_MS
        self._lock = threading.Lock()
        down, up = addresses(folder)
        self._down.bind(down)
        self._up.connect(up)

    def tell(self, message: Upward) -> None:
        """Sends without waiting. Raises PeerError when the front leaves too much unread."""
        data = encode(message)
        with self._lock:
            try:
                self._up.send(data, zmq.NOBLOCK)
            except zmq.Again as error:
                raise PeerError(f"the front process has left {UNREAD} messages unread") from error

    def hear(self, seconds: float) -> Downward | None:
        """The next message, or None when none comes in time."""
        if not self._down.poll(int(seconds * 1000)):
            return None
        message: Downward = decode_down(self._down.recv())
        return message

    def close(self) -> None:
        """Sends what is left, within `LINGER_MS`."""
        self._down.close(0)
        with self._lock:
            self._up.close()
        self._context.term()
