"""Copies many runs between tensors of one device by few large operations: what a device needs in place of a loop.

Long runs are copied one by one. Short ones of one length are gathered and scattered as rows of two tables whose row is
the greatest common divisor of their offsets and length, so that any run is a whole number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tessera.transfer.base import Runs
from tessera.transfer.mover import Regions

LONG = 1 << 18  # bytes from which a run is copied by itself
CALL = 1 << 28  # bytes between two chances to stop
_TABLE = 1 << 26  # bytes gathered at once
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def copy_runs(runs: Runs, src: Regions, dst: Regions) -> Iterator[None]:
    """Copies bytes from regions of `src` to regions of `dst`, all rows of uint8 that this device can reach.

    Yields about every `CALL` bytes, so that the caller can wait for the device, or stop.
    """
    moved = 0
    for part in _parts(runs):
        source, target, length = src[int(part[0, 0])], dst[int(part[0, 2])], int(part[0, 4])
        if length >= LONG:
            (_, at, _, to, _) = part[0].tolist()
            target[to : to + length].copy_(source[at : at + length], non_blocking=True)
        else:
            _rows(source, target, part[:, 1], part[:, 3], length)
        moved += len(part) * length
        if moved >= CALL:
            yield
            moved = 0
    yield


def _parts(runs: Runs) -> Iterator[Runs]:
    """Each long run; the short ones of one length between two regions, `_TABLE` bytes at most."""
    runs = runs[runs[:, 4] > 0]
    long = runs[:, 4] >= LONG
    yield from (runs[long][i : i + 1] for i in range(int(long.sum())))
    short = runs[~long]
    _, group = np.unique(short[:, [0, 2, 4]], axis=0, return_inverse=True)
    for number in range(int(group.max()) + 1 if len(short) else 0):
        alike = short[group.reshape(-1) == number]
        most = max(_TABLE // int(alike[0, 4]), 1)
        yield from (alike[at : at + most] for at in range(0, len(alike), most))


def _rows(source: Tensor, target: Tensor, at: np.ndarray, to: np.ndarray, length: int) -> None:
    """`target[to : to + length] = source[at : at + length]` for all places at once."""
    row = int(np.gcd.reduce(np.concatenate([at, to, [length]])))
    word = next(w for w in _WORDS if row % w == 0 and not any(t.data_ptr() % w for t in (source, target)))
    each = np.arange(length // row)
    index = [(places[:, None] // row + each).reshape(-1) for places in (at, to)]
    pick, put = torch.from_numpy(np.stack(index)).to(target.device)
    _table(target, row, word).index_copy_(0, put, _table(source, row, word).index_select(0, pick))


def _table(memory: Tensor, row: int, word: int) -> Tensor:
    """The bytes as rows of `row` bytes in words; a rest at the end is left out, since no run can reach into it."""
    whole = memory[: memory.numel() // row * row]
    return whole.view(_WORDS[word]).view(-1, row // word)
