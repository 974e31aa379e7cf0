"""Ways to move bytes that tests hold up, and the engines over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from tessera.transfer.base import Runs
from tessera.transfer.host import HostMover, HostSource
from tessera.transfer.mover import Regions, Wait
from tessera.transfer.pull import PullEngine
from transfer.conformance import DEADLINE_S

Make = Callable[[HostMover], PullEngine]


class Gate(HostMover):
    """Copies when it is let; `begun` tells that a copy waits."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let = threading.Event(), threading.Event()
        self.closed = 0

    def open(self, exported: bytes, own: Regions) -> HostSource:
        gate, source = self, super().open(exported, own)
        copy = source.copy

        def gated(batch: Runs, stop: threading.Event) -> None:
            gate.begun.set()
            assert gate.let.wait(DEADLINE_S)
            copy(batch, threading.Event())  # as a library whose calls cannot be broken off

        def close() -> None:
            gate.closed += 1

        source.copy, source.close = gated, close  # type: ignore[method-assign]
        return source


class Stream(HostMover):
    """Copies as a GPU does: `copy` hands them to a stream, which is waited for. `under_way`: what was begun and is not
    over, at each copy; the stream stands still while `hold` is taken, and nothing is handed to it while `door` is."""

    def __init__(self) -> None:
        super().__init__()
        self.hold, self.door, self.under_way = threading.Lock(), threading.Lock(), [0]
        self._now = 0

    def open(self, exported: bytes, own: Regions) -> HostSource:
        stream, source, queue = self, super().open(exported, own), ThreadPoolExecutor(1)
        copy = source.copy

        def on_stream(batch: Runs) -> None:
            with stream.hold:
                copy(batch, threading.Event())  # a launch cannot be broken off

        def launch(batch: Runs, stop: threading.Event) -> Wait:
            with stream.door:
                stream._now += 1
                stream.under_way.append(stream._now)
                done = queue.submit(on_stream, batch)

            def wait() -> None:
                done.result()
                stream._now -= 1

            return wait

        source.copy, source.close = launch, queue.shutdown  # type: ignore[method-assign]
        return source


def making() -> Iterator[Make]:
    """For a fixture: makes engines, and closes them."""
    made: list[PullEngine] = []

    def make(mover: HostMover) -> PullEngine:
        made.append(PullEngine(mover))
        return made[-1]

    yield make
    for engine in made:
        if isinstance(engine._mover, Gate):
            engine._mover.let.set()
        engine.close()
