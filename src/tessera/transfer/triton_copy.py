"""Copies many runs between memories that one GPU reaches, its own or a peer's, in one launch.

Each of `PROGRAMS` programs of few warps takes an equal share of all pieces of all runs, one after the other, and leaves
room for a model's programs beside it. A peer's memory answers after about two microseconds, so what counts is bytes
under way: a piece for each program. What is sent to the device is the runs, not the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from tessera.transfer.mover import Addressed, Wait, calls

PIECE = 1 << 14  # bytes of a program at a time
PROGRAMS = 128
WARPS = 4
CALL = 1 << 28  # bytes between two chances to stop
DESKS = 4  # one more than calls of a writer are under way
_WORDS = {16: (tl.int64, 8), 8: (tl.int64, 8), 4: (tl.int32, 4), 2: (tl.int16, 2), 1: (tl.int8, 1)}


@triton.jit(do_not_specialize=["num_runs", "num_pieces", "share"])  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    table, num_runs, num_pieces, share, WORD: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`table`: `[4, num_runs]` address of the source, of the target, length in units of `ALIGNED` bytes and number of
    the first piece of each run; then, for each program, the run of its first piece. Pieces have `BLOCK` words."""
    i = tl.arange(0, BLOCK)
    piece = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(piece + share, num_pieces)
    run = tl.load(table + num_runs * 4 + tl.program_id(0))
    while piece < last:
        source = tl.load(table + run).to(tl.pointer_type(WORD))
        target = tl.load(table + num_runs + run).to(tl.pointer_type(WORD))
        words = tl.load(table + num_runs * 2 + run) * (ALIGNED // SIZE)
        first = tl.load(table + num_runs * 3 + run)
        end = tl.minimum(first + tl.cdiv(words, BLOCK), last)
        while piece < end:
            at = (piece - first) * BLOCK + i
            value = tl.load(tl.multiple_of(source, ALIGNED) + at, mask=at < words)
            tl.store(tl.multiple_of(target, ALIGNED) + at, value, mask=at < words)
            piece += 1
        run += 1


class Copier:
    """Copies bytes between addresses that `device` reaches, on the stream that is current where it is called.

    `mark` gives what waits for all that was put on that stream until now. Of one thread.
    """

    def __init__(self, device: torch.device, mark: Callable[[], Wait]) -> None:
        self._device, self._mark = device, mark
        self._desks: dict[tuple[int, int], _Desk] = {}
        self._turn = 0
        nothing = np.zeros(1, np.uint64)  # the first copies would wait for the compiler
        self._launch(Addressed(nothing, nothing, nothing))

    def __call__(self, runs: Addressed) -> Iterator[Wait]:
        """Yields about every `CALL` bytes, which are under way, what waits for them; goes on or not as it is asked."""
        for part in calls(runs.lengths, len(runs.lengths), CALL):
            yield self._launch(Addressed(*(column[part] for column in runs)))

    def _launch(self, runs: Addressed) -> Wait:
        num_runs = len(runs.lengths)
        pieces = (runs.lengths + np.uint64(PIECE - 1)) >> np.uint64(PIECE.bit_length() - 1)
        ends = np.cumsum(pieces)
        num_pieces = int(ends[-1])
        share = max(-(-num_pieces // PROGRAMS), 1)
        programs = max(-(-num_pieces // share), 1)
        desk = self._desk(4 * num_runs + programs)
        columns = desk.table[: 4 * num_runs].reshape(4, num_runs)
        columns[0], columns[1], columns[2], columns[3] = *runs, ends - pieces
        every = reduce(or_, np.bitwise_or.reduce(columns[:3], axis=1).tolist(), max(_WORDS))
        aligned = every & -every
        columns[2] >>= np.uint64(aligned.bit_length() - 1)
        first = np.arange(0, programs * share, share, dtype=np.uint64)
        desk.table[4 * num_runs : 4 * num_runs + programs] = np.searchsorted(ends, first, side="right")
        kernel, sizes = _kernel(self._device, aligned, PIECE)
        desk.there.copy_(desk.told, non_blocking=True)
        kernel[(programs, 1, 1)](desk.there, num_runs, num_pieces, share, *sizes)
        desk.wait = self._mark()
        return desk.wait

    def _desk(self, size: int) -> _Desk:
        """One of `DESKS` for that many numbers, in turn, once the copies are over for which it was used before."""
        self._turn = (self._turn + 1) % DESKS
        key = max(1 << (size - 1).bit_length(), 1024), self._turn
        if key not in self._desks:
            self._desks[key] = _Desk(key[0], self._device)
        self._desks[key].wait()
        return self._desks[key]


class _Desk:
    """Where a table is written, and what is sent of it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.told = torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.table = self.told.numpy().view(np.uint64)
        self.there = torch.empty(size, dtype=torch.int64, device=device)
        self.wait: Wait = _nothing


def _nothing() -> None:
    """What nothing is waited for with."""


@lru_cache
def _kernel(device: torch.device, aligned: int, piece: int) -> tuple[Any, tuple[Any, ...]]:
    """The kernel for addresses and lengths of that alignment, and the last of its arguments.

    It is launched as it was compiled: to look at the arguments anew takes longer than a copy of 10 MB.
    """
    word, size = _WORDS[aligned]
    sizes = word, size, aligned, piece // size
    if not isinstance(_copy, triton.JITFunction):  # the interpreter
        return _copy, sizes
    with torch.cuda.device(device):
        return _copy.warmup(torch.int64, 1, 1, 1, *sizes, num_warps=WARPS, grid=(1,)), sizes
