"""How long each stage of a start took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import psutil

ORDER = ("imports", "config", "processes", "connect", "kernels", "weights", "pools", "halves", "first token")

SHORT_S = 0.05  # most starts compile nothing


class Stages(msgspec.Struct):
    """Seconds by stage: "imports" of the engine's process from its start on, "config", "processes" (of ranks: started,
    their imports), "connect", "kernels" (those of a library are compiled, ours waited for), "weights", "pools",
    "halves" (from which size on steps run as halves is measured), and "first token" (what was not compiled ahead is, or
    is read from Triton's cache).

    `weight_bytes`: of the weights of a rank.
    """

    seconds: dict[str, float] = {}
    weight_bytes: int = 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """The block is (a part of) a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def imported(self) -> None:
        """All that this process did so far was to start and to import."""
        self.seconds["imports"] = time.time() - psutil.Process().create_time()

    def follow(self, ranks: Sequence[Stages]) -> None:
        """Adds the stages of ranks that ran side by side: the slowest counts."""
        for rank in ranks:
            for stage, seconds in rank.seconds.items():
                self.seconds[stage] = max(self.seconds.get(stage, 0.0), seconds)
            self.weight_bytes = max(self.weight_bytes, rank.weight_bytes)

    def line(self) -> str:
        """For people: "imports 3.1 s, weights 2.0 s (31.4 GB, 15.7 GB/s), ..."."""
        told = [name for name in ORDER if name in self.seconds and (name != "kernels" or self.seconds[name] > SHORT_S)]
        return ", ".join(f"{name} {self._told(name)}" for name in told)

    def _told(self, stage: str) -> str:
        seconds = self.seconds[stage]
        if stage != "weights" or not seconds:
            return f"{seconds:.1f} s"
        size, each = self.weight_bytes / 1e9, " a rank" if "processes" in self.seconds else ""
        return f"{seconds:.1f} s ({size:.1f} GB{each}, {size / seconds:.1f} GB/s)"
