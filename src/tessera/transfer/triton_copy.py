"""Copies many runs between memories that one GPU reaches, its own or a peer's, in one launch.

Each of `PROGRAMS` programs of few warps takes an equal share of all pieces of all runs, one after the other, and leaves
room for a model's programs beside it. A peer's memory answers after about two microseconds, so what counts is bytes
under way: a piece for each program. What is sent to the device is the runs, not the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_

import numpy as np
import torch
import triton
import triton.language as tl

from tessera.transfer.mover import Addressed, calls

PIECE = 1 << 14  # bytes of a program at a time
PROGRAMS = 128
WARPS = 4
CALL = 1 << 28  # bytes between two chances to stop
_WORDS = {16: (tl.int64, 8), 8: (tl.int64, 8), 4: (tl.int32, 4), 2: (tl.int16, 2), 1: (tl.int8, 1)}


@triton.jit(do_not_specialize=["num_runs", "num_pieces", "share"])  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]
    table, num_runs, num_pieces, share, WORD: tl.constexpr, SIZE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`table`: `[num_runs, 4]` address of the source, of the target, length in units of `ALIGNED` bytes and number of
    the first piece of each run; then, for each program, the run of its first piece. Pieces have `BLOCK` words."""
    i = tl.arange(0, BLOCK)
    piece = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(piece + share, num_pieces)
    run = tl.load(table + num_runs * 4 + tl.program_id(0))
    while piece < last:
        row = table + run * 4
        source = tl.load(row).to(tl.pointer_type(WORD))
        target = tl.load(row + 1).to(tl.pointer_type(WORD))
        words = tl.load(row + 2) * (ALIGNED // SIZE)
        first = tl.load(row + 3)
        end = tl.minimum(first + tl.cdiv(words, BLOCK), last)
        while piece < end:
            at = (piece - first) * BLOCK + i
            value = tl.load(tl.multiple_of(source, ALIGNED) + at, mask=at < words)
            tl.store(tl.multiple_of(target, ALIGNED) + at, value, mask=at < words)
            piece += 1
        run += 1


def copy_runs(runs: Addressed, device: torch.device) -> Iterator[None]:
    """Copies bytes between addresses that `device` reaches, on its current stream.

    Yields about every `CALL` bytes, when these are under way, so that the caller can wait for the device, or stop.
    """
    for part in calls(runs.lengths, len(runs.lengths), CALL):
        _launch(Addressed(*(column[part] for column in runs)), device)
        yield


def _launch(runs: Addressed, device: torch.device) -> None:
    num_runs = len(runs.lengths)
    every = reduce(or_, (int(np.bitwise_or.reduce(column)) for column in runs), max(_WORDS))
    aligned = every & -every
    word, size = _WORDS[aligned]
    pieces = -(-runs.lengths.view(np.int64) // PIECE)
    ends = np.cumsum(pieces)
    num_pieces = int(ends[-1])
    share = max(-(-num_pieces // PROGRAMS), 1)
    programs = max(-(-num_pieces // share), 1)
    told = torch.empty(4 * num_runs + programs, dtype=torch.int64, pin_memory=device.type == "cuda")
    table = told.numpy()
    rows = table[: 4 * num_runs].reshape(num_runs, 4)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = runs.src, runs.dst, runs.lengths // aligned, ends - pieces
    table[4 * num_runs :] = np.searchsorted(ends, np.arange(0, programs * share, share), side="right")
    _copy[(programs,)](
        told.to(device, non_blocking=True), num_runs, num_pieces, share, word, size, aligned, PIECE // size,
        num_warps=WARPS,
    )  # fmt: skip


def prepare(device: torch.device) -> None:
    """Has the device ready for the first copies: they would wait for the compiler otherwise."""
    nothing = np.zeros(1, np.uint64)
    _launch(Addressed(nothing, nothing, nothing), device)
