"""What an engine of `pull.py` needs of a way to move bytes: the reader copies from the writer's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tessera.core.errors import PeerError
from tessera.transfer.base import PerRegion, Runs

Addresses = NDArray[np.uint64]
Wait = Callable[[], None]
Regions = Mapping[int, Tensor]  # each a row of uint8


class Source(Protocol):
    """The memory of one writer, as one thread of the reader sees it."""

    def copy(self, runs: Runs, stop: threading.Event) -> Wait | None:
        """Copies. None: every byte has landed; else the copies are under way, and what it returns waits for that, and
        is called before the memory is said to be written. Others may be begun meanwhile; they end in this order.

        May give up when `stop` is set. Both raise `PeerError`.
        """
        ...

    def close(self) -> None:
        """Lets go of the writer. When this returns nothing of it lands any more, whatever `copy` had begun."""
        ...


class Mover(Protocol):
    """A way to move bytes."""

    @property
    def kind(self) -> str:
        """Its name in the manifest."""
        ...

    @property
    def host(self) -> str | None:
        """The address at which peers reach this side; None for a way that ends with this host."""
        ...

    def export(self, regions: Regions) -> bytes:
        """Makes the regions of this side readable by peers, and says what they need to know."""
        ...

    def open(self, exported: bytes, own: Regions) -> Source:
        """The memory that a writer exported, to be copied into `own`, for the calling thread, which does nothing else.

        Raises `PeerError` when it cannot be reached.
        """
        ...

    def close(self) -> None:
        """Takes back what `export` made readable."""
        ...


class Addressed(NamedTuple):
    """Runs with addresses for regions and offsets."""

    src: Addresses
    dst: Addresses
    lengths: Addresses


def addressed(runs: Runs, places: PerRegion, most: int | None = None) -> Addressed:
    """`places`: where each region begins. Runs of more than `most` bytes are cut into pieces.

    Raises `PeerError` for a region that has no place.
    """
    found = places(runs)
    if found.size and found.min() < 0:
        raise PeerError("a region that is copied has no address")
    src, dst = found + runs.T[1:4:2]
    lengths = runs[:, 4]
    if most is not None and len(runs) and lengths.max() > most:
        pieces = np.maximum(-(-lengths // most), 1)
        first = np.cumsum(pieces) - pieces
        offsets = (np.arange(pieces.sum()) - np.repeat(first, pieces)) * most
        src, dst = np.repeat(src, pieces) + offsets, np.repeat(dst, pieces) + offsets
        lengths = np.minimum(np.repeat(lengths, pieces) - offsets, most)
    return Addressed(src.view(np.uint64), dst.view(np.uint64), lengths.view(np.uint64))


def calls(lengths: Addresses, num_runs: int, num_bytes: int) -> Iterator[slice]:
    """Cuts runs into calls of at most so many runs and, but for a single run, so many bytes."""
    if 0 < len(lengths) <= num_runs and lengths.sum() <= num_bytes:
        yield slice(0, len(lengths))
        return
    ends = np.cumsum(lengths)
    first = 0
    while first < len(lengths):
        begin = ends[first] - lengths[first]
        last = int(np.searchsorted(ends, begin + np.uint64(num_bytes), side="right"))
        end = min(max(last, first + 1), first + num_runs)
        yield slice(first, end)
        first = end


def starts(regions: Regions) -> dict[int, int]:
    """Where each region begins."""
    return {number: memory.data_ptr() for number, memory in regions.items()}
