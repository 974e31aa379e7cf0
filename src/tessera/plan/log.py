"""The event log: what went into a planner, in order, from which its steps follow again. No I/O: lines are bytes.

A line is one JSON object. The first holds the configuration; then one line for each call: the events that were applied,
or the step that was planned, as its index, its size and a checksum of all of it (steps are not stored: they follow).
Give a `Recorder` to whoever drives a planner, in its place, with a function that keeps lines:

    with open(path, "wb") as file:
        loop = StepLoop(Recorder(planner, file.write), ...)

and read them with `for step in replay(file): ...`, which raises `LogError` at the first step that differs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from tessera.core.errors import LogError
from tessera.core.messages import Output
from tessera.plan.config import PlannerConfig
from tessera.plan.events import Event
from tessera.plan.handoff import Errand
from tessera.plan.scheduler import Planner
from tessera.plan.step import Step


class Began(msgspec.Struct, tag=True, frozen=True):
    """A planner was made."""

    config: PlannerConfig


class Applied(msgspec.Struct, tag=True, frozen=True):
    """`apply(events)` was called."""

    events: list[Event]


class Planned(msgspec.Struct, tag=True, frozen=True):
    """`next_step()` was called. `index` is -1 where it gave nothing; `checksum` is the CRC-32 of `encode(step)`."""

    index: int
    num_tokens: int = 0
    checksum: int = 0


Record = Began | Applied | Planned


def _plain(value: object) -> object:
    """Arrays as [dtype, shape, values]."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.ravel().tolist()
    raise TypeError(f"the event log cannot hold a {type(value).__name__}")


def _array(kind: Any, value: Any) -> object:
    dtype, shape, values = value
    return np.array(values, dtype).reshape(shape)


def encode(value: object) -> bytes:
    """A record, a step or an event as one line of JSON, line end included."""
    return msgspec.json.encode(value, enc_hook=_plain) + b"\n"


def decode(line: bytes, number: int = 1) -> Record:
    """The record of a line; `LogError` names line `number` where it is not one."""
    try:
        record: Record = msgspec.json.decode(line, type=Record, dec_hook=_array)
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise LogError(
            number, f"it is not a record of one ({error}); the log is cut off or from another version"
        ) from error
    return record


def planned(step: Step | None) -> Planned:
    """The record of a step."""
    return Planned(-1) if step is None else Planned(step.index, step.num_tokens, zlib.crc32(encode(step)))


class Recorder:
    """A planner whose calls are written down. `write` gets whole lines; what is applied is written before it is tried,
    so that the last line of a planner that failed is what it failed on."""

    def __init__(self, planner: Planner, write: Callable[[bytes], object]) -> None:
        self.planner = planner
        self._write = write
        write(encode(Began(planner.config)))

    @property
    def idle(self) -> bool:
        """No request is here and no step is in flight."""
        return self.planner.idle

    @property
    def stopping(self) -> bool:
        """`Stop` came: the engine may end when it is idle."""
        return self.planner.stopping

    def apply(self, events: Sequence[Event]) -> list[Output]:
        """See `Planner.apply`."""
        self._write(encode(Applied(list(events))))
        return self.planner.apply(events)

    def errands(self) -> list[Errand]:
        """See `Planner.errands`."""
        return self.planner.errands()

    def next_step(self) -> Step | None:
        """See `Planner.next_step`."""
        step = self.planner.next_step()
        self._write(encode(planned(step)))
        return step


def replay(lines: Iterable[bytes], check: bool = False) -> Iterator[Step | None]:
    """What each `next_step()` of a log gave, planned again. `check`: the planner is checked after every call.

    Raises `LogError` at a line that cannot be read, and at the first step that is not the one recorded.
    """
    planner: Planner | None = None
    for number, line in enumerate(lines, 1):
        record = decode(line, number)
        if isinstance(record, Began):
            planner = Planner(record.config)
            continue
        if planner is None:
            raise LogError(number, "a log begins with the configuration of its planner")
        if isinstance(record, Applied):
            planner.apply(record.events)
        else:
            step = planner.next_step()
            if planned(step) != record:
                raise LogError(number, f"recorded {record}, but the same events give {planned(step)} now")
            yield step
        if check:
            planner.check()
