"""Timing of launches on a CUDA device: replayed graphs over rotated inputs, medians, and the device's two ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`bandwidth`: bytes/s of a large copy, read and written; `flops`: a second, of a large bf16 product of noise."""

    device: str
    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measured op: its time, and its share of the limit, the larger of bytes and operations over their ceilings."""

    op: str
    case: str
    us: float
    limit_us: float
    share: float

    @classmethod
    def of(cls, op: str, case: str, us: float, num_bytes: float, flops: float, ceilings: Ceilings) -> Row:
        limit = 1e6 * max(num_bytes / ceilings.bandwidth, flops / ceilings.flops)
        return cls(op, case, us, limit, limit / us)

    def __str__(self) -> str:
        return f"{self.op:18} {self.case:34} {self.us:9.1f} us  limit {self.limit_us:8.1f}  {100 * self.share:5.1f} %"

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def graph_us(calls: Sequence[Call], at_least_us: float = 3000.0) -> float:
    """Microseconds of one call: the median of replays of a graph that makes all calls, in turn, several times.

    Several calls should differ in their inputs, so that none finds its own in the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the inputs are made by
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    once = _replayed_us(calls, 1, stream)
    return _replayed_us(calls, max(1, min(100, round(at_least_us / once / len(calls)))), stream)


def _replayed_us(calls: Sequence[Call], times: int, stream: torch.cuda.Stream) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    found = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * start.elapsed_time(end) / times / len(calls))
    return statistics.median(found)


def ceilings() -> Ceilings:
    """Measures them."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = graph_us([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = graph_us([lambda: a @ b])
    return Ceilings(torch.cuda.get_device_name(), 2 * source.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6)
