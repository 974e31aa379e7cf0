"""The phases of a hand-over as spans under the span of the call that asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tessera.core.messages import HandoverTimes
from tessera.serve.answer import Usage
from tessera.serve.trace import Span

BYTES, SECONDS, ITEM = "tessera.transfer.bytes", "tessera.transfer.seconds", "tessera.item"


class Phase(NamedTuple):
    """What went on from `begin` to `end` (of `time.monotonic`)."""

    name: str
    begin: float
    end: float
    attributes: dict[str, float]


def phases(times: HandoverTimes, first: float | None) -> Iterator[Phase]:
    """Those of one prompt at this server, in order. `first`: when its first token came, at decode."""
    if times.waiting is None:
        here = {"bootstrap": times.meeting, "queue": times.queue, "prefill": times.prefill, "transfer": times.transfer}
    else:
        here = {"bootstrap": times.meeting, "decode queue": times.queue, "transfer wait": times.waiting}
    moved = {BYTES: times.num_bytes, SECONDS: times.writing}
    begin = times.ended - sum(here.values())
    for name, seconds in here.items():
        yield Phase(name, begin, begin + seconds, moved if name.startswith("transfer") else {})
        begin += seconds
    if times.waiting is not None and first is not None:
        yield Phase("first token", times.ended, max(first, times.ended), {})


def record(span: Span, usage: Sequence[Usage], first: Mapping[int, float]) -> None:
    """Tells `span` of all prompts of a request that were handed over; `first`: when the first token of each came."""
    for item, one in enumerate(usage):
        if one.handed is not None:
            for name, begin, end, attributes in phases(one.handed, first.get(item)):
                span.phase(name, begin, end, {**attributes, ITEM: item})
