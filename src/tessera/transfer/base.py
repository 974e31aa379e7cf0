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


class ByRegion:
    """A number (bytes, address; not negative) of each region, for the regions of many runs at a time."""

    def __init__(self, values: Mapping[int, int]) -> None:
        self.known = sorted(values)
        self._table = np.full(max(values, default=-1) + 2, -1, np.int64)  # the last is of regions that are too large
        self._table[self.known] = [values[number] for number in self.known]
        self._last = np.uint64(len(self._table) - 1)

    def __call__(self, regions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each. Raises `KeyError` with a region that has none."""
        at = np.minimum(regions.view(np.uint64), self._last)  # what is negative is too large as well
        found = self._table[at.view(np.int64)]
        if len(found) and found.min() < 0:
            raise KeyError(int(regions[np.argmin(found)]))
        return found


def check_runs(runs: Runs, own: ByRegion, theirs: ByRegion) -> None:
    """Raises `ValueError` when a run lies outside a region. `own`, `theirs`: bytes of each region."""
    if runs.ndim != 2 or runs.shape[1] != 5:
        raise ValueError(f"runs have shape {runs.shape}, expected [n, 5]")
    length = runs[:, 4]
    for side, regions, region, offset in (("source", own, 0, 1), ("destination", theirs, 2, 3)):
        try:
            sizes = regions(runs[:, region])
        except KeyError as error:
            reason = f"region {error.args[0]} is not registered; registered: {regions.known}"
            raise ValueError(f"{side} {reason}") from None
        first = runs[:, offset]
        wrong = (first > sizes - length) | ((first | length) < 0)  # `first + length` may be more than a number holds
        if wrong.any():
            at = int(np.argmax(wrong))
            reach = f"{length[at]} bytes from {first[at]} on"
            raise ValueError(f"{side} region {runs[at, region]} has {sizes[at]} bytes; a run is {reach}")
