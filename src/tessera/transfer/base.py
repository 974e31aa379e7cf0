"""The protocol of a transfer engine: one side writes bytes into memory that the other side registered.

An engine moves bytes and knows nothing of pages, heads or models: what to copy where follows from the layouts
(`core/reshard.py`). Both sides run an engine. The reader registers its pools and publishes `endpoint()`; the writer
registers its own, connects, and posts one batch of runs per step and peer. Whether a batch has landed is asked with
`poll`, which never blocks, so an engine needs no thread of the step loop's.

The promise that an engine must keep: after `fence(writer)` has returned, no write of that writer lands any more,
however early it was posted. A reader that gives up on a writer fences it before it gives the pages to somebody else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.errors import TesseraError

FENCE_S = 10.0
Runs = NDArray[np.int64]  # [n, 5]: source region, source offset, destination region, destination offset, length; bytes


@dataclass(frozen=True, slots=True)
class Done:
    """A batch is over. `error` is None when every byte of it has landed; otherwise some may have and some may not."""

    ticket: int
    error: TesseraError | None = None


class Engine(Protocol):
    """One side of the wire. Regions are numbered by the side that registers them. Not thread-safe unless it says so."""

    def register(self, region: int, memory: Tensor) -> None:
        """Makes `memory` (contiguous; host or device) readable and writable as `region`, until `close`."""
        ...

    def endpoint(self) -> bytes:
        """What a writer needs to reach this side; opaque, travels in the manifest. Register every region before."""
        ...

    def connect(self, endpoint: bytes, deadline_s: float) -> str:
        """Makes the side behind `endpoint` a peer and returns its name.

        Raises `DeadlineError` when it does not answer in time, `PeerError` when it refuses or speaks another protocol.
        """
        ...

    def write(self, peer: str, runs: Runs) -> int:
        """Posts copies from own regions to those of `peer`; returns a ticket at once. No two runs may overlap there.

        The source must be computed (on CUDA: its stream synchronised) and not change until the ticket is done. Raises
        `ValueError` for a run outside a region; that a peer has left or has fenced this side is told by `poll`.
        """
        ...

    def poll(self) -> Sequence[Done]:
        """Batches that are over since the last call. Never blocks. Every ticket comes exactly once.

        After an error the peer is lost, and further batches fail, until it is connected again.
        """
        ...

    def wait(self, also: int | None, seconds: float | None) -> None:
        """Blocks until `poll` may have something to say, until the file `also` is readable, or for `seconds` (None:
        for ever). It may return early."""
        ...

    def fence(self, writer: str, deadline_s: float = FENCE_S) -> None:
        """Returns when no write of `writer` (its own `name`) can land here any more; later batches of it fail.

        Blocks at most for the copies under way. Lifted by that writer's next `connect`. Raises `DeadlineError` when a
        copy is still under way at the deadline: the memory stays in doubt, and `fence` can be asked again.
        """
        ...

    @property
    def name(self) -> str:
        """This side's name: unique to the process and its start, so that a successor is somebody else."""
        ...

    def close(self) -> None:
        """Leaves: batches under way fail, memory is no longer registered. Safe to call twice."""
        ...


class PerRegion:
    """A number (bytes, address; not negative) of each region of either side, for the regions of many runs at a time."""

    def __init__(self, source: Mapping[int, int], destination: Mapping[int, int]) -> None:
        self.sides = source, destination
        lasts = [max(side, default=-1) + 1 for side in self.sides]  # of regions that are too large, or negative
        firsts = [0, lasts[0] + 1]
        self._last, self._first = np.array(lasts, np.uint64)[:, None], np.array(firsts, np.int64)[:, None]
        self._table = np.full(sum(lasts) + 2, -1, np.int64)
        for first, side in zip(firsts, self.sides, strict=True):
            self._table[[first + number for number in side]] = list(side.values())

    def __call__(self, runs: Runs) -> NDArray[np.int64]:
        """`[2, n]`: the number of each run's source, and destination; -1 for a region that has none."""
        at = np.minimum(runs.T[0:3:2].view(np.uint64), self._last).view(np.int64)
        return np.take(self._table, at + self._first)


def check_runs(runs: Runs, sizes: PerRegion) -> None:
    """Raises `ValueError` when a run lies outside a region. `sizes`: bytes of each. Quick where columns are rows in
    memory (`np.asfortranarray`)."""
    if runs.ndim != 2 or runs.shape[1] != 5:
        raise ValueError(f"runs have shape {runs.shape}, expected [n, 5]")
    found, first, length = sizes(runs), runs.T[1:4:2], runs.T[4]
    wrong = (first > found - length) | ((first | length) < 0)  # `first + length` may be more than a number holds
    if wrong.any():
        side, at = divmod(int(np.argmax(wrong)), len(runs))
        region, size = runs[at, 2 * side], found[side, at]
        what = f"{('source', 'destination')[side]} region {region}"
        if size < 0:
            raise ValueError(f"{what} is not registered; registered: {sorted(sizes.sides[side])}")
        raise ValueError(f"{what} has {size} bytes; a run is {length[at]} bytes from {first[side, at]} on")
