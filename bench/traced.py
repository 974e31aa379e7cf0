"""What the profiler says of a run: launches, how busy the device was, and where its time went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch.profiler import ProfilerActivity, profile

from ours import Ours
from tessera.core.messages import StepReport


@dataclass(frozen=True, slots=True)
class Traced:
    """Per step: launches, and milliseconds in which the device had nothing to do between the first and the last of
    them. `busy`: share of the time that it computed. `top`: kernels by microseconds a step."""

    launches: float
    busy: float
    gap_ms: float
    top: dict[str, float] = field(default_factory=dict)


def traced(work: Callable[[], object], ours: Ours, counts: Callable[[StepReport], bool]) -> Traced:
    """Runs `work` under the profiler, and looks at the last steps of the run, as many as `counts` holds for."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        torch.cuda.synchronize()
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    steps = list(takewhile(counts, reversed(ours.steps)))
    seconds = sum(step.seconds for step in steps)
    if not events or not steps:
        return Traced(0, 0, 0)
    first = events[-1][1] - seconds * 1e6
    events = [event for event in events if event[0] >= first]
    busy, until = 0.0, events[0][0]
    for start, end, _ in events:
        busy += max(end - max(start, until), 0.0)
        until = max(until, end)
    whole = until - events[0][0]
    spent: Counter[str] = Counter()
    for start, end, name in events:
        spent[name] += end - start
    top = {name: spent[name] / len(steps) for name, _ in spent.most_common(25)}
    return Traced(len(events) / len(steps), busy / whole, (whole - busy) / 1e3 / len(steps), top)
