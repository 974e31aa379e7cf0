"""A writer and a reader in two processes, and what a hand-over between them takes: for `bench/handover.py`."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Sequence
from itertools import cycle, islice, pairwise
from multiprocessing.connection import Connection

import torch

from tessera.transfer.base import Engine, Runs
from tessera.transfer.engines import MOVERS, make_engine
from tessera.transfer.mover import Mover, Regions, Source, Wait
from tessera.transfer.pull import PullEngine

DEADLINE_S = 120.0
LEGS = ("posted", "heard", "launched", "copied", "acknowledged")
# The clock of all processes of a host.
now = time.perf_counter


class Watched:
    """A mover of a reader; `stamps`: when each batch was heard and checked, launched, and copied."""

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        self.kind, self.host = mover.kind, mover.host
        self.export, self.close = mover.export, mover.close
        self.stamps: list[tuple[float, float, float]] = []

    def open(self, exported: bytes, own: Regions) -> Source:
        """See `Mover.open`."""
        return _WatchedSource(self._mover.open(exported, own), self.stamps)


class _WatchedSource:
    def __init__(self, source: Source, stamps: list[tuple[float, float, float]]) -> None:
        self._source, self._stamps = source, stamps
        self.close = source.close

    def copy(self, runs: Runs, stop: threading.Event) -> Wait | None:
        """See `Source.copy`."""
        heard = now()
        wait = self._source.copy(runs, stop)
        launched = now()
        if wait is None:
            self._stamps.append((heard, launched, launched))
            return None

        def watched() -> None:
            wait()
            self._stamps.append((heard, launched, now()))

        return watched


def _reader(pipe: Connection, kind: str, device: str, sizes: list[int]) -> None:
    torch.set_num_threads(1)
    mover = Watched(MOVERS[kind]("127.0.0.1", None))
    engine = PullEngine(mover)
    for region, size in enumerate(sizes):
        engine.register(region, torch.zeros(size, dtype=torch.uint8, device=device))
    pipe.send(engine.endpoint())
    while pipe.recv():
        pipe.send(mover.stamps)
        mover.stamps.clear()
    engine.close()


class Link:
    """A writer in this process and its reader in another."""

    def __init__(self, kind: str, devices: tuple[str, str], sizes: list[int]) -> None:
        self._engine: Engine = make_engine(kind)
        for region, size in enumerate(sizes):
            memory = torch.zeros(size, dtype=torch.uint8, device=devices[0]).fill_(1)
            self._engine.register(region, memory)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_reader, args=(theirs, kind, devices[1], sizes), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is heard
        self._peer = self._engine.connect(self._pipe.recv(), DEADLINE_S)

    def seconds(self, runs: Runs, rounds: int) -> float:
        """The best of several rounds, from the post to the acknowledgement."""
        return min(over - began for began, _, over in (self._once(runs) for _ in range(rounds)))

    def legs(self, runs: Runs, rounds: int) -> dict[str, float]:
        """Seconds from each of `LEGS` to the next, the first from the call of `write`; medians."""
        self._stamps()
        took = [self._once(runs) for _ in range(rounds)]
        found = []
        for (began, posted, over), (heard, launched, copied) in zip(took, self._stamps(), strict=True):
            assert began <= heard <= launched <= copied <= over, "stamps of another round"
            times = (began, posted, heard, launched, copied, over)
            found.append([b - a for a, b in pairwise(times)])
        return {leg: statistics.median(column) for leg, column in zip(LEGS, zip(*found, strict=True), strict=True)}

    def sustained(self, batches: Sequence[Runs], num: int) -> float:
        """Seconds of each of `num` hand-overs, all batches under way at once: when one is over it is posted again."""
        under_way, began = 0, now()
        posts, left = islice(cycle(batches), num), num
        while left:
            while under_way < len(batches) and (runs := next(posts, None)) is not None:
                self._engine.write(self._peer, runs)
                under_way += 1
            over = self._over(began)
            under_way, left = under_way - over, left - over
        return (now() - began) / num

    def _once(self, runs: Runs) -> tuple[float, float, float]:
        """When `write` was called, when it returned, and when it was over."""
        began = now()
        self._engine.write(self._peer, runs)
        posted = now()
        while not self._over(began):
            pass
        return began, posted, now()

    def _over(self, began: float) -> int:
        """Waits for some batch to be over; how many are."""
        self._engine.wait(None, 1.0)
        done = self._engine.poll()
        if (error := next((one.error for one in done if one.error is not None), None)) is not None:
            raise RuntimeError(f"the copy failed: {error}")
        if now() - began > DEADLINE_S:
            raise TimeoutError(f"a copy took more than {DEADLINE_S} s")
        return len(done)

    def _stamps(self) -> list[tuple[float, float, float]]:
        self._pipe.send(True)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends both sides."""
        self._pipe.send(False)
        self._process.join()
        self._engine.close()
