"""Routed rows in order of their experts, on the device. R routed rows (T tokens * k), E experts, M rows a block.

A row's place among those of its expert is left to chance (integer atomics) where there are many: every product is taken
row by row and written to the row's own place, so that no result depends on the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.triton_common import chained, follow

FEW, ONE = 1024, 4096  # rows up to which each program counts all of them by itself: one launch
CHUNK = 2048  # rows of a program where there are more
LISTED = 32  # blocks that a program describes


@dataclass(frozen=True, slots=True)
class Sorted:
    """`rows` [R] int32: routed rows, those of an expert together; rows of -1 are left out and the end is not written.

    `blocks` [B, 3] int32: expert (-1: none), first and end in `rows` of at most M rows of one expert; all of an
    expert's blocks are neighbours. B is the most that there can be; blocks of none come last. `ends` [E] int32:
    where each expert's rows end when those of every expert begin with a block, and where they would begin if it has
    none.
    """

    rows: Tensor
    blocks: Tensor
    ends: Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _count(ids_ptr, counts_ptr, taken_ptr, num_rows, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """counts [C, BINS] of each chunk of rows; `taken` starts at 0."""
    follow()
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + at, mask=at < num_rows, other=-1).to(tl.int32)
    own = chunk * BINS + tl.arange(0, BINS)
    tl.store(counts_ptr + own, tl.histogram(expert, BINS, mask=expert >= 0))
    tl.store(taken_ptr + own, tl.zeros([BINS], tl.int32))


@triton.jit
def _totals(counts_ptr, chunk, num_chunks, BINS: tl.constexpr):
    """Rows of each expert in all chunks, and in those before `chunk`."""
    bins = tl.arange(0, BINS)[None, :]
    total, before = tl.zeros([BINS], tl.int32), tl.zeros([BINS], tl.int32)
    for at in range(0, num_chunks, 8):
        c = at + tl.arange(0, 8)[:, None]
        counts = tl.load(counts_ptr + c * BINS + bins, mask=c < num_chunks, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(c < chunk, counts, 0), 0)
    return total, before


@triton.jit
def _list_blocks(
    blocks_ptr, ends_ptr, which, total, num_blocks, BINS: tl.constexpr, M: tl.constexpr, LISTED: tl.constexpr
):
    """Blocks `which * LISTED ..`: the expert of a block is the number of experts whose blocks end at or before it."""
    bins = tl.arange(0, BINS)
    count = (total + M - 1) // M
    block_end, row_end = tl.cumsum(count, 0), tl.cumsum(total, 0)
    block = which * LISTED + tl.arange(0, LISTED)
    expert = tl.sum((block_end[None, :] <= block[:, None]).to(tl.int32), 1)
    own = bins[None, :] == expert[:, None]
    first_block = tl.sum(tl.where(own, (block_end - count)[None, :], 0), 1)
    first_row = tl.sum(tl.where(own, (row_end - total)[None, :], 0), 1)
    end = tl.sum(tl.where(own, row_end[None, :], 0), 1)
    first = first_row + (block - first_block) * M
    at = blocks_ptr + block * 3
    valid = block < num_blocks
    tl.store(at, tl.where(expert < BINS, expert, -1), mask=valid)
    tl.store(at + 1, first, mask=valid)
    tl.store(at + 2, tl.minimum(first + M, end), mask=valid)
    if which == 0:
        tl.store(ends_ptr + bins, (block_end - count) * M + total)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_blocks"])
def _place(
    ids_ptr, counts_ptr, taken_ptr, rows_ptr, blocks_ptr, ends_ptr, num_rows, num_chunks, num_blocks,
    BINS: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr, M: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Programs `0 .. num_chunks - 1` write the rows of their chunk, the others the list of blocks."""
    follow()
    chunk = tl.program_id(0)
    at = tl.where(chunk < num_chunks, chunk, 0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + at, mask=at < num_rows, other=-1).to(tl.int32)
    if ALONE:
        total = tl.histogram(expert, BINS, mask=expert >= 0)
        before = tl.zeros([BINS], tl.int32)
    else:
        total, before = _totals(counts_ptr, chunk, num_chunks, BINS)
    if chunk >= num_chunks:
        _list_blocks(blocks_ptr, ends_ptr, chunk - num_chunks, total, num_blocks, BINS, M, LISTED)
    else:
        taken = taken_ptr + chunk * BINS
        if ALONE:
            tl.store(taken + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
            tl.debug_barrier()  # before this program's own additions
        first = tl.cumsum(total, 0) - total + before
        held = expert >= 0
        own = tl.where(held, expert, 0)
        nth = tl.atomic_add(taken + own, 1, mask=held, sem="relaxed")
        tl.store(rows_ptr + tl.gather(first, own, 0) + nth, at, mask=held)


def most_blocks(num_rows: int, num_experts: int, block: int) -> int:
    """Blocks of `block` rows that `num_rows` rows of `num_experts` experts can need at most."""
    return (num_rows + min(num_experts, num_rows) * (block - 1)) // block


def sort_rows(ids: Tensor, num_experts: int, block: int) -> Sorted:
    """Sorts the routed rows of ids [T, k] (-1: held elsewhere) by expert, in blocks of `block` rows."""
    ids = ids.contiguous()
    num_rows, bins = ids.numel(), triton.next_power_of_2(num_experts)
    alone = num_rows <= ONE
    chunk = (FEW if num_rows <= FEW else ONE) if alone else CHUNK  # a size is compiled when it is met first
    num_chunks, num_blocks = triton.cdiv(num_rows, chunk), most_blocks(num_rows, num_experts, block)
    ints = {"dtype": torch.int32, "device": ids.device}
    counts, taken = torch.empty(2, num_chunks, bins, **ints)
    rows, blocks, ends = (torch.empty(*n, **ints) for n in ((num_rows,), (num_blocks, 3), (bins,)))
    if not alone:
        _count[num_chunks,](ids, counts, taken, num_rows, BINS=bins, CHUNK=chunk, num_warps=8, **chained(ids.device))
    _place[num_chunks + triton.cdiv(num_blocks, LISTED),](
        ids, counts, taken, rows, blocks, ends, num_rows, num_chunks, num_blocks,
        BINS=bins, CHUNK=chunk, ALONE=alone, M=block, LISTED=LISTED, num_warps=8, **chained(ids.device),
    )  # fmt: skip
    return Sorted(rows, blocks, ends[:num_experts])
