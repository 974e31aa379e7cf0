"""The phases of a hand-over as spans under the span of the call that asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tessera.core.messages import HandoverTimes
from tessera.serve.answer import Usage
from tessera.serve.trace import Span

BYTES, SECONDS, ITEM = "tessera.transfer.bytes", "tessera.transfer.seconds", "tessera.item"


@dataclass(frozen=True, slots=True)
class Phase:
    """What went on from `begin` to `end` (of `time.monotonic`)."""

    name: str
    begin: float
    end: float
    attributes: dict[str, float] = field(default_factory=dict)


def phases(times: HandoverTimes, first: float | None) -> Iterator[Phase]:
    """Those of one prompt at this server, in order. `first`: when its first token came, at decode."""
    moved = {BYTES: times.num_bytes, SECONDS: times.writing}
    at_prefill: list[tuple[str, float, dict[str, float]]] = [
        ("bootstrap", times.meeting, {}),
        ("queue", times.queue, {}),
        ("prefill", times.prefill, {}),
        ("transfer", times.transfer, moved),
    ]
    at_decode: list[tuple[str, float, dict[str, float]]] = [
        ("bootstrap", times.meeting, {}),
        ("decode queue", times.queue, {}),
        ("transfer wait", times.waiting or 0.0, moved),
    ]
    here = at_prefill if times.waiting is None else at_decode
    begin = times.ended - sum(seconds for _, seconds, _ in here)
    for name, seconds, attributes in here:
        yield Phase(name, begin, begin + seconds, attributes)
        begin += seconds
    if times.waiting is not None and first is not None:
        yield Phase("first token", times.ended, max(first, times.ended))


def record(span: Span, usage: Sequence[Usage], first: Mapping[int, float]) -> None:
    """Tells `span` of all prompts of a request that were handed over; `first`: when the first token of each came."""
    for item, one in enumerate(usage):
        if one.handed is not None:
            for phase in phases(one.handed, first.get(item)):
                span.phase(phase.name, phase.begin, phase.end, {**phase.attributes, ITEM: item})
