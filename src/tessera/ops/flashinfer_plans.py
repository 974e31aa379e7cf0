"""What FlashInfer's wrappers are told of a step, and how a wrapper stays a step's own until all layers have run.

A wrapper's `plan` reads a step's lengths on the host, writes how the work is cut into pinned memory and has the device
copy it; `run`, once a layer, then waits for nothing. The host is steps ahead of the device, so a wrapper may only be
planned anew when its step is over on the host and its copy is done on the device. S segments.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from tessera.ops.segments import Ints, Segments
from tessera.ops.upload import staged, upload

W = TypeVar("W")
Done = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges and their pages, int32. Host tensors (on CUDA pinned): `queries` [S + 1], where each range's tokens begin;
    `pages` [S + 1], where its pages begin in `indices` (on the device); `last` [S], tokens of its last page;
    `keys` [S], tokens of its sequence."""

    queries: Tensor
    pages: Tensor
    last: Tensor
    keys: Tensor
    indices: Tensor


def ranges_of(segments: Segments) -> Ranges:
    """What the host knows of a step, and its page tables one after the other without what lies behind a sequence."""
    return segments.once("flashinfer ranges", lambda: _ranges(segments))


def _ranges(segments: Segments) -> Ranges:
    size, width = segments.page_size, segments.page_table.shape[1]
    ends = segments.host_starts + segments.host_lengths
    counts = -(-ends // size)
    queries, pages = begins(segments.host_lengths), begins(counts)
    last = ends - (counts - 1) * size
    columns = (queries, pages, last.astype(np.int32), ends.astype(np.int32))
    host = staged(np.concatenate(columns), segments.device).split([len(column) for column in columns])
    row = np.repeat(np.arange(len(counts)), counts)
    at = row * width + np.arange(pages[-1]) - np.repeat(pages[:-1], counts)
    return Ranges(*host, segments.page_table.flatten()[upload(at, segments.device)])


def begins(counts: Ints) -> Ints:
    """[S + 1]: sums of the counts before each."""
    found = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=found[1:])
    return found


class Planned(Generic[W]):
    """A wrapper that is planned for a step, its own for as long as somebody holds this."""

    def __init__(self, wrapper: W) -> None:
        self.wrapper = wrapper


class Turns(Generic[W]):
    """Wrappers of one kind, which take turns. `make` makes one more; `mark` says, later, whether all that the device
    had been given by then is done: asked after planning, it tells when the pinned memory may be written again."""

    def __init__(self, make: Callable[[], W], mark: Callable[[], Done]) -> None:
        self._make, self._mark = make, mark
        self._free: deque[tuple[W, Done]] = deque()

    def take(self, plan: Callable[[W], None]) -> Planned[W]:
        """A wrapper that `plan` has planned; it comes back by itself. One more is made rather than waited for."""
        wrapper = self._free.popleft()[0] if self._free and self._free[0][1]() else self._make()
        plan(wrapper)
        planned = Planned(wrapper)
        weakref.finalize(planned, self._free.append, (wrapper, self._mark()))
        return planned
