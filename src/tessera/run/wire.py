"""The wire between an engine and its ranks: messages by msgspec, arrays as their raw bytes. No pickle: ranks may be on
other hosts.

Rank -> engine: `Hello`, then `Loading`, `Loaded`, then `Done` for each step from ranks that answer, `Kept` for each
`Record` and `Try`, and `Told`; `Failed` at any time, as the last. Engine -> rank: `Begin`, then `Run`, `Record`, `Try`,
`Trace`, `Drop`, `Do`, and `End` as the last; `Look` at any time.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import zmq

from tessera.core.config.types import Config
from tessera.core.errors import Conflict
from tessera.core.messages import Output
from tessera.plan.step import Step, StepDone
from tessera.run.graphs import Size
from tessera.run.hosts import Identity, Placed
from tessera.run.poster import News, Order, Seat
from tessera.run.profiling import ProfileOrder
from tessera.run.recording import Act
from tessera.run.report import Tally
from tessera.run.stages import Stages

HEARTBEAT_MS, SILENCE_MS = 1000, 4000


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A rank is there and wants to know what to be. `placed`: how its host was started, where that is another one."""

    placed: Placed | None = None


class Loading(msgspec.Struct, tag=True, frozen=True):
    """`done` of `total` elements of the rank's weights are there."""

    done: int
    total: int


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """The rank has met the others and can run steps. `seat`: how ranks of other servers reach it, if they may.
    `stages`: what its start took."""

    seat: Seat | None = None
    stages: Stages = msgspec.field(default_factory=Stages)


class Told(msgspec.Struct, tag=True, frozen=True):
    """What became of an order, or of something that was to be written elsewhere."""

    news: News


class Done(msgspec.Struct, tag=True, frozen=True):
    """A step came back from a rank that answers for its DP rank."""

    done: StepDone
    outputs: list[Output]
    tallies: list[Tally]


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The rank ends. `kind`: name of the error's class; `conflicts`: of a `ConfigError`."""

    kind: str
    error: str
    conflicts: tuple[Conflict, ...] = ()


class Begin(msgspec.Struct, tag=True, frozen=True):
    """What a rank shall be. `meeting`: host:port at which the ranks meet. `model`: what is in the folders of
    other hosts too (`hosts.py`)."""

    config: Config
    meeting: str
    model: Identity = ("", "")


class Run(msgspec.Struct, tag=True, frozen=True):
    """The next step."""

    step: Step


class Drop(msgspec.Struct, tag=True, frozen=True):
    """The choice has ended elsewhere: nothing of it may come out any more."""

    request_id: str
    choice: int


class Do(msgspec.Struct, tag=True, frozen=True):
    """An order about other servers."""

    order: Order


class Trace(msgspec.Struct, tag=True, frozen=True):
    """A profile begins or ends; of each that begins the rank tells `Traced`."""

    order: ProfileOrder


class Record(msgspec.Struct, tag=True, frozen=True):
    """An act of recording steps of `size` (`recording.py`); answered by `Kept`."""

    size: Size
    act: Act


class Try(msgspec.Struct, tag=True, frozen=True):
    """An act of a step that runs for its time (`trials.py`); answered by `Kept`."""

    step: Step
    act: Act


class Kept(msgspec.Struct, tag=True, frozen=True):
    """An act is over. `missing`: the memory that it lacked, empty when it went well."""

    missing: str = ""


class Look(msgspec.Struct, tag=True, frozen=True):
    """Nothing: that it can be sent shows that the rank is there."""


class End(msgspec.Struct, tag=True, frozen=True):
    """Finish what is under way and leave. `why`: its host is refused."""

    why: tuple[Conflict, ...] = ()


class Spawn(msgspec.Struct, frozen=True):
    """What a rank's process is told as it starts: where its engine listens, which process starts it, which rank and
    which device it is to be, the model's folder, for how many seconds its engine may be silent until all ranks have
    come, at rank 0 a socket that listens where the ranks meet, and what its host resolved where that is not the
    engine's."""

    address: str
    parent: int
    rank: int
    device: int
    folder: str
    patience: float
    listening: int | None = None
    config: Config | None = None


def watched(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that becomes readable when one that `socket` was connected to has gone, or is silent for some seconds.

    The threads of ZeroMQ ask and answer, so a rank that computes is not silent.
    """
    socket.heartbeat_ivl, socket.heartbeat_timeout = HEARTBEAT_MS, SILENCE_MS
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)


Down = Begin | Run | Record | Try | Trace | Drop | Do | Look | End
Up = Hello | Loading | Loaded | Done | Kept | Told | Failed


def plain(value: object) -> object:
    """An array as (dtype, shape, bytes)."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise TypeError(f"the wire cannot hold a {type(value).__name__}")


def array(kind: Any, value: Any) -> object:
    """The array again, with memory of its own: torch takes no arrays that may not be written."""
    dtype, shape, data = value
    return np.frombuffer(data, dtype).reshape(shape).copy()


encode = msgspec.msgpack.Encoder(enc_hook=plain).encode
decode_down = msgspec.msgpack.Decoder(Down, dec_hook=array).decode
decode_up = msgspec.msgpack.Decoder(Up, dec_hook=array).decode
