"""Copies many runs between memories that one GPU reaches, its own or a peer's, in one launch.

Runs are cut into pieces on the host; programs of few warps take them in turn, and leave room for a model's beside them.
A peer's memory answers after about two microseconds, so what counts is bytes under way: a piece for each of `PROGRAMS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import triton
import triton.language as tl

from tessera.transfer.base import Runs
from tessera.transfer.mover import addressed, calls

PIECE = 1 << 14  # bytes of a program at a time
PROGRAMS = 128
CALL = 1 << 28  # bytes between two chances to stop
_WORDS = {16: (tl.int64, 8, 16), 8: (tl.int64, 8, 8), 4: (tl.int32, 4, 4), 2: (tl.int16, 2, 2), 1: (tl.int8, 1, 1)}


@triton.jit  # type: ignore[untyped-decorator]
def _copy(table, count, WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`table` [count, 3]: address of the source and of the target, and words of each piece, `BLOCK` at most."""
    i = tl.arange(0, BLOCK)
    for piece in range(tl.program_id(0), count, tl.num_programs(0)):
        source = tl.load(table + piece * 3).to(tl.pointer_type(WORD))
        target = tl.load(table + piece * 3 + 1).to(tl.pointer_type(WORD))
        words = tl.load(table + piece * 3 + 2)
        value = tl.load(tl.multiple_of(source, ALIGNED) + i, mask=i < words)
        tl.store(tl.multiple_of(target, ALIGNED) + i, value, mask=i < words)


def copy_runs(runs: Runs, src: Mapping[int, int], dst: Mapping[int, int], device: torch.device) -> Iterator[None]:
    """Copies bytes between regions that begin at addresses `src` and `dst`, on the current stream of `device`.

    Yields about every `CALL` bytes, so that the caller can wait for the device, or stop.
    """
    runs = runs[runs[:, 4] > 0]
    for part in calls(runs[:, 4].astype(np.uint64), len(runs), CALL):
        table = np.stack(addressed(runs[part], src, dst, PIECE), 1).astype(np.int64)
        word, size, aligned = _WORDS[np.gcd(np.gcd.reduce(table, axis=None), 16)]
        table[:, 2] //= size
        _copy[(min(PROGRAMS, len(table)),)](
            torch.from_numpy(table).to(device), len(table), word, aligned, PIECE // size, num_warps=4
        )
        yield
