"""Products of fp8 weights in blocks with activations quantised on the fly; see `fp8.py` for the scheme and the shapes.

A program adds up products of K neighbours in the tensor cores, K no larger than a block, and scales their sum in fp32:
the tensor cores' own sums of fp8 keep few digits, so none of them is longer than a block. The scales of the next block
are on their way meanwhile. M rows, N columns a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops import triton_fp8_few as few
from tessera.ops.fp8 import GROUP, Block, Fp8Weight
from tessera.ops.linear import AfterGate
from tessera.ops.precision import kept_in
from tessera.ops.triton_common import chained, dot, follow, num_processors
from tessera.ops.triton_fp8_rows import Quantized, quantize
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_moe import work_of
from tessera.ops.triton_sort import sort_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns (gated: of each half) of a tile, and how a program runs. `group` blocks of rows go through all
    columns before the next ones."""

    m: int
    n: int
    warps: int
    stages: int
    group: int = 1


@dataclass(frozen=True, slots=True)
class Tiles:
    """Those for up to `rows` rows (of an expert, on average): of a weight, and of experts' two, of the same `m`."""

    rows: float
    linear: Tile
    up: Tile
    down: Tile


TILES = (
    Tiles(4, Tile(16, 64, 4, 4), Tile(16, 32, 4, 4), Tile(16, 64, 4, 4)),
    Tiles(16, Tile(32, 64, 4, 4), Tile(32, 32, 4, 4), Tile(32, 64, 4, 4)),
    Tiles(110, Tile(64, 64, 4, 4), Tile(64, 64, 4, 4), Tile(64, 64, 4, 4)),
    Tiles(float("inf"), Tile(128, 128, 8, 3, 8), Tile(128, 64, 8, 3, 4), Tile(128, 128, 8, 3, 4)),
)
NARROW = 32  # columns


def tiles_of(rows: float) -> Tiles:
    """For so many rows of a weight."""
    return next(t for t in TILES if rows <= t.rows)


def spread(tile: Tile, rows: int, out: int, processors: int) -> Tile:
    """The tile for `rows` of x and `out` of a weight: where there would be fewer programs than processors, more and
    narrower ones with more of the weight on its way. What a program adds up, and in which order, stays the same."""
    if triton.cdiv(out, tile.n) * triton.cdiv(rows, tile.m) >= processors or tile.n <= NARROW:
        return tile
    return replace(tile, n=NARROW, stages=2 * tile.stages)


@triton.jit
def _rows(x, row, held, k, COLUMNS: tl.constexpr, K: tl.constexpr):
    """[M, K]: columns k .. of the rows `row` of x."""
    inner = k + tl.arange(0, K)
    at = x + row[:, None] * COLUMNS + inner[None, :]
    return tl.load(at, mask=held[:, None] & (inner < COLUMNS)[None, :], other=0.0)


@triton.jit
def _weights(w, which, first, limit, k, COLUMNS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr):
    """[K, COUNT * N]: columns k .. of the rows `first` .. of the matrices `which` .., of `limit` rows each."""
    nth, inner = tl.arange(0, COUNT * N), k + tl.arange(0, K)
    row = first + nth % N
    at = w + ((which + nth // N) * limit + row).to(tl.int64)[None, :] * COLUMNS + inner[:, None]
    return tl.load(at, mask=(row < limit)[None, :] & (inner < COLUMNS)[:, None], other=0.0)


@triton.jit
def _row_scales(xs, row, held, k, across, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """[M] of the group that begins at column k."""
    return tl.load(xs + k // GROUP * across + row, mask=held & (k < COLUMNS), other=0.0)


@triton.jit
def _block_scales(
    ws, first, limit, k, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr
):
    """Of the blocks that begin at column k: one for all N rows of a weight, or where they lie in several [N]."""
    count: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    if BLOCK_N % N == 0:
        return tl.load(ws + (first // BLOCK_N) * count + k // BLOCK_K, mask=k < COLUMNS, other=0.0)
    else:
        row = first + tl.arange(0, N)
        return tl.load(ws + (row // BLOCK_N) * count + k // BLOCK_K, mask=(row < limit) & (k < COLUMNS), other=0.0)


@triton.jit
def _scaled(total, sums, xs, ws, BLOCK_N: tl.constexpr, N: tl.constexpr):
    """total [M, N] plus sums times the scales of their rows and columns."""
    if BLOCK_N % N == 0:
        return total + sums * (xs * ws)[:, None]
    else:
        return total + sums * (xs[:, None] * ws[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_columns", "across"])
def _linear(
    x, xs, w, ws, y, num_rows, num_blocks, num_columns, across,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TURN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [T, OUT] = x w."""
    follow()
    pid = tl.program_id(0)
    block = pid // (TURN * num_columns) * TURN
    size, inside = tl.minimum(num_blocks - block, TURN), pid % (TURN * num_columns)
    top, first = (block + inside % size) * M, inside // size * N
    row, column = top + tl.arange(0, M), first + tl.arange(0, N)
    held = row < num_rows
    wide = row.to(tl.int64)
    total = tl.zeros([M, N], tl.float32)
    row_scales = _row_scales(xs, row, held, 0, across, COLUMNS, GROUP)
    scales = _block_scales(ws, first, OUT, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        next_row_scales = _row_scales(xs, row, held, k + K, across, COLUMNS, GROUP)
        next_scales = _block_scales(ws, first, OUT, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
        a = _rows(x, wide, held, k, COLUMNS, K)
        sums = dot(a, _weights(w, 0, first, OUT, k, COLUMNS, N, K, 1), None)
        total = _scaled(total, sums, row_scales, scales, BLOCK_N, N)
        row_scales, scales = next_row_scales, next_scales
    y_at = y + wide[:, None] * OUT + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=held[:, None] & (column < OUT)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_columns", "across"])
def _up(
    x, xs, w, ws, h, rows, blocks, num_blocks, num_columns, across,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, FOLD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h [R, OUT] in the order of experts: silu of a first OUT columns of x times their weight, times a second OUT ones;
    row r of x is that of the routed rows r * FOLD .. ."""
    expert, begin, end, tile = work_of(blocks, num_blocks, num_columns, TURN)
    if expert < 0:
        return
    at, first = begin + tl.arange(0, M), tile * N
    held = at < end
    x_row = tl.load(rows + at, mask=held, other=0) // FOLD
    wide = x_row.to(tl.int64)
    ws += expert.to(tl.int64) * (tl.cdiv(2 * OUT, BLOCK_N) * tl.cdiv(COLUMNS, BLOCK_K))
    gate, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    row_scales = _row_scales(xs, x_row, held, 0, across, COLUMNS, GROUP)
    scales = _block_scales(ws, first, OUT, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    up_scales = _block_scales(ws, OUT + first, 2 * OUT, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        next_row_scales = _row_scales(xs, x_row, held, k + K, across, COLUMNS, GROUP)
        next_scales = _block_scales(ws, first, OUT, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
        next_up_scales = _block_scales(ws, OUT + first, 2 * OUT, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
        a = _rows(x, wide, held, k, COLUMNS, K)
        both = dot(a, _weights(w, expert * 2, first, OUT, k, COLUMNS, N, K, 2), None)
        sums, up_sums = tl.split(both.reshape(M, 2, N).permute(0, 2, 1))
        gate = _scaled(gate, sums, row_scales, scales, BLOCK_N, N)
        up = _scaled(up, up_sums, row_scales, up_scales, BLOCK_N, N)
        row_scales, scales, up_scales = next_row_scales, next_scales, next_up_scales
    column = first + tl.arange(0, N)
    h_at = h + at.to(tl.int64)[:, None] * OUT + column[None, :]
    made = gate / (1 + tl.exp(-gate)) * up
    tl.store(h_at, made.to(h.dtype.element_ty), mask=held[:, None] & (column < OUT)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_columns", "across"])
def _down(
    h, hs, w, ws, y, rows, blocks, num_blocks, num_columns, across,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TURN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [R, OUT], to each row's own place: h [R, COLUMNS], in the order of experts, times their weights."""
    expert, begin, end, tile = work_of(blocks, num_blocks, num_columns, TURN)
    if expert < 0:
        return
    at, first = begin + tl.arange(0, M), tile * N
    held = at < end
    wide = at.to(tl.int64)
    ws += expert.to(tl.int64) * (tl.cdiv(OUT, BLOCK_N) * tl.cdiv(COLUMNS, BLOCK_K))
    total = tl.zeros([M, N], tl.float32)
    row_scales = _row_scales(hs, at, held, 0, across, COLUMNS, GROUP)
    scales = _block_scales(ws, first, OUT, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        next_row_scales = _row_scales(hs, at, held, k + K, across, COLUMNS, GROUP)
        next_scales = _block_scales(ws, first, OUT, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
        a = _rows(h, wide, held, k, COLUMNS, K)
        sums = dot(a, _weights(w, expert, first, OUT, k, COLUMNS, N, K, 1), None)
        total = _scaled(total, sums, row_scales, scales, BLOCK_N, N)
        row_scales, scales = next_row_scales, next_scales
    row, column = tl.load(rows + at, mask=held, other=0).to(tl.int64), first + tl.arange(0, N)
    y_at = y + row[:, None] * OUT + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=held[:, None] & (column < OUT)[None, :])


def _sizes(tile: Tile, block: Block, columns: int, out: int, device: torch.device) -> dict[str, object]:
    return {
        "COLUMNS": columns, "OUT": out, "BLOCK_N": block[0], "BLOCK_K": block[1], "GROUP": block[1], "TURN": tile.group,
        "M": tile.m, "N": tile.n, "K": block[1], "STAGES": tile.stages, "num_warps": tile.warps, **chained(device),
    }  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, scales: Tensor, block: Block = (GROUP, GROUP), tile: Tile | None = None,
    unrounded: bool = False,
) -> Tensor:  # fmt: skip
    """See `fp8.linear_reference`. `block`: powers of two. `tile` overrides what the tables say."""
    dtype = kept_in(x.dtype, unrounded)
    if tile is None and 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block, dtype=dtype)
    return product(quantize(x, block[1]), Fp8Weight(weight, scales, block), dtype, tile)


def product(x: Quantized, w: Fp8Weight, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """x [T, K] times w [N, K] -> [T, N] in `dtype`, by tiles."""
    (values, row_scales), (out, columns), (weight, scales, block) = x, w.values.shape, (w.values, w.scales, w.block)
    num_rows = len(values)
    tile = tile or spread(tiles_of(num_rows).linear, num_rows, out, num_processors(values.device))
    y = torch.empty(num_rows, out, dtype=dtype, device=weight.device)
    if num_rows:
        num_blocks, num_columns = triton.cdiv(num_rows, tile.m), triton.cdiv(out, tile.n)
        _linear[num_blocks * num_columns,](
            values, row_scales, weight, scales, y, num_rows, num_blocks, num_columns, row_scales.stride(1),
            **_sizes(tile, block, columns, out, weight.device),
        )  # fmt: skip
    return y


def gated(x: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """silu(gate) * up of `linear` with a weight [gate | up, K]."""
    if 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block, gated=True)
    return silu_mul(linear(x, weight, scales, block))


def after_gate(w: Fp8Weight) -> AfterGate:
    """The product with w of what a gate gives, which is quantised as it is made."""

    def multiply(y: Tensor, unrounded: bool) -> Tensor:
        return product(quantize(y, w.block[1], gated=True), w, kept_in(y.dtype, unrounded))

    return AfterGate(few.ROWS, multiply)


def rows_of_experts(
    x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, tiles: Tiles | None = None, unrounded: bool = False
) -> Tensor:
    """[T * k, H]: what each of its experts makes of a token; the rows of id -1 are not written. Of each weight [E, ..]
    the blocks are powers of two, the rows of w13's divide I. `tiles` override what the tables say."""
    inner, tiles = w2.values.shape[2], tiles or tiles_of(ids.numel() / len(w2.values))
    assert inner % w13.block[0] == 0, f"a block of {w13.block[0]} rows would hold both halves of {inner}"
    by_expert = sort_rows(ids, len(w2.values), tiles.up.m)
    rows, blocks, num_blocks = by_expert.rows, by_expert.blocks, len(by_expert.blocks)
    (values, scales), h = quantize(x, w13.block[1]), x.new_empty(ids.numel(), inner)
    num_columns = triton.cdiv(inner, tiles.up.n)
    _up[num_blocks * num_columns,](
        values, scales, w13.values, w13.scales, h, rows, blocks, num_blocks, num_columns, scales.stride(1),
        FOLD=ids.shape[1], **_sizes(tiles.up, w13.block, x.shape[1], inner, x.device),
    )  # fmt: skip
    (values, scales), out = quantize(h, w2.block[1]), w2.values.shape[1]
    y, num_columns = x.new_empty(ids.numel(), out, dtype=kept_in(x.dtype, unrounded)), triton.cdiv(out, tiles.down.n)
    _down[num_blocks * num_columns,](
        values, scales, w2.values, w2.scales, y, rows, blocks, num_blocks, num_columns, scales.stride(1),
        **_sizes(tiles.down, w2.block, inner, out, x.device),
    )  # fmt: skip
    return y
