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
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera.ops import triton_fp8_few as few
from tessera.ops.fp8 import GROUP, Block, Fp8Weight
from tessera.ops.triton_combine import combine
from tessera.ops.triton_common import chained, dot, follow, num_processors
from tessera.ops.triton_fp8_rows import Quantized, empty, quantize, store
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_moe import work_of
from tessera.ops.triton_sort import Sorted, sort_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns (gated: of each half) of a tile, and how a program runs. `group` blocks of rows go through all
    columns before the next ones. `boxed`: what lies in order is fetched by the tensor memory accelerator, in boxes,
    where its rows are aligned for it."""

    m: int
    n: int
    warps: int
    stages: int
    group: int = 1
    boxed: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """Those for up to `rows` rows (of an expert, on average): of a weight, and of experts' two, whose `m` is the same.

    `up`: of as many columns as activations have in a group, it quantises what it gives.
    """

    rows: float
    linear: Tile
    up: Tile
    down: Tile


TILES = (
    Tiles(4, Tile(16, 64, 4, 4), Tile(16, 32, 4, 4), Tile(16, 64, 4, 4)),
    Tiles(16, Tile(32, 64, 4, 4), Tile(32, 32, 4, 4), Tile(32, 64, 4, 4)),
    Tiles(110, Tile(64, 64, 4, 4), Tile(64, 64, 4, 4), Tile(64, 64, 4, 4)),
    Tiles(float("inf"), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 128, 8, 3)),
)
NARROW = 32  # columns
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


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
def _rows(x, row, held, first, k, COLUMNS: tl.constexpr, K: tl.constexpr, BOXED: tl.constexpr):
    """[M, K]: columns k .. of the rows `row` of x, or of those from `first` on."""
    if BOXED:
        return x.load([first, k])
    else:
        inner = k + tl.arange(0, K)
        at = x + row[:, None] * COLUMNS + inner[None, :]
        return tl.load(at, mask=held[:, None] & (inner < COLUMNS)[None, :], other=0.0)


@triton.jit
def _weights(w, above, first, limit, k, COLUMNS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BOXED: tl.constexpr):
    """[K, N]: columns k .. of the rows `above + first ..` of all weights; past `limit` they are not used."""
    if BOXED:
        return w.load([above + first, k]).T
    else:
        row, inner = first + tl.arange(0, N), k + tl.arange(0, K)
        at = w + (above + row).to(tl.int64)[None, :] * COLUMNS + inner[:, None]
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
    COLUMNS: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_BOXED: tl.constexpr, BOXED: tl.constexpr, TURN: tl.constexpr,
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
        a = _rows(x, wide, held, top, k, COLUMNS, K, X_BOXED)
        sums = dot(a, _weights(w, 0, first, OUT, k, COLUMNS, N, K, BOXED), None)
        total = _scaled(total, sums, row_scales, scales, BLOCK_N, N)
        row_scales, scales = next_row_scales, next_scales
    y_at = y + wide[:, None] * OUT + column[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=held[:, None] & (column < OUT)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_columns", "across", "y_across"])
def _grouped(
    x, xs, w, ws, y, ys, rows, blocks, num_blocks, num_columns, across, y_across,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, FOLD: tl.constexpr, GATED: tl.constexpr, QUANTIZES: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BOXED: tl.constexpr, TURN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [R, OUT]: row r times its expert's weight, from row r / FOLD of x; GATED: silu of a first OUT columns times a
    second OUT columns of the weight; QUANTIZES: of that N columns are a group, whose scales go to ys."""
    expert, begin, end, tile = work_of(blocks, num_blocks, num_columns, TURN)
    if expert < 0:
        return
    at, first = begin + tl.arange(0, M), tile * N
    held = at < end
    row = tl.load(rows + at, mask=held, other=0)
    column, x_row = first + tl.arange(0, N), row // FOLD
    wide = x_row.to(tl.int64)
    total: tl.constexpr = 2 * OUT if GATED else OUT
    above = expert * total
    ws += expert.to(tl.int64) * (tl.cdiv(total, BLOCK_N) * tl.cdiv(COLUMNS, BLOCK_K))
    made, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    row_scales = _row_scales(xs, x_row, held, 0, across, COLUMNS, GROUP)
    scales = _block_scales(ws, first, OUT, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    if GATED:
        up_scales = _block_scales(ws, OUT + first, total, 0, COLUMNS, BLOCK_N, BLOCK_K, N)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        next_row_scales = _row_scales(xs, x_row, held, k + K, across, COLUMNS, GROUP)
        next_scales = _block_scales(ws, first, OUT, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
        a = _rows(x, wide, held, 0, k, COLUMNS, K, False)
        sums = dot(a, _weights(w, above, first, OUT, k, COLUMNS, N, K, BOXED), None)
        made = _scaled(made, sums, row_scales, scales, BLOCK_N, N)
        if GATED:
            next_up_scales = _block_scales(ws, OUT + first, total, k + K, COLUMNS, BLOCK_N, BLOCK_K, N)
            sums = dot(a, _weights(w, above + OUT, first, OUT, k, COLUMNS, N, K, BOXED), None)
            up = _scaled(up, sums, row_scales, up_scales, BLOCK_N, N)
            up_scales = next_up_scales
        row_scales, scales = next_row_scales, next_scales
    if GATED:
        made = made / (1 + tl.exp(-made)) * up
    if QUANTIZES:
        store(made.to(DTYPE).to(tl.float32), row, tile, held, y, ys, y_across, OUT, N)
    else:
        y_at = y + row.to(tl.int64)[:, None] * OUT + column[None, :]
        tl.store(y_at, made.to(y.dtype.element_ty), mask=held[:, None] & (column < OUT)[None, :])


def _boxes(matrix: Tensor, height: int, width: int, wanted: bool) -> tuple[Tensor | TensorDescriptor, bool]:
    """A matrix [rows, columns] of bytes without gaps, in boxes where that is wanted and its rows are aligned for it."""
    boxed = wanted and matrix.shape[-1] % 16 == 0
    return (TensorDescriptor.from_tensor(matrix, [height, width]) if boxed else matrix), boxed


def _sizes(tile: Tile, block: Block, columns: int, out: int, device: torch.device) -> dict[str, object]:
    return {
        "COLUMNS": columns, "OUT": out, "BLOCK_N": block[0], "BLOCK_K": block[1], "GROUP": block[1], "TURN": tile.group,
        "M": tile.m, "N": tile.n, "K": block[1], "STAGES": tile.stages, "num_warps": tile.warps, **chained(device),
    }  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, scales: Tensor, block: Block = (GROUP, GROUP), tile: Tile | None = None
) -> Tensor:
    """See `fp8.linear_reference`. `block`: powers of two. `tile` overrides what the tables say."""
    if tile is None and 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block)
    if tile is None:
        tile = spread(tiles_of(len(x)).linear, len(x), len(weight), num_processors(x.device))
    return product(quantize(x, block[1]), weight, scales, block, tile, x.dtype)


def product(x: Quantized, weight: Tensor, scales: Tensor, block: Block, tile: Tile, dtype: torch.dtype) -> Tensor:
    """x [T, K] times weight [N, K] -> [T, N] in `dtype`, by tiles."""
    (values, row_scales), (out, columns) = x, weight.shape
    num_rows = len(values)
    y = torch.empty(num_rows, out, dtype=dtype, device=weight.device)
    if num_rows:
        num_blocks, num_columns = triton.cdiv(num_rows, tile.m), triton.cdiv(out, tile.n)
        x_in, x_boxed = _boxes(values, tile.m, block[1], tile.boxed)
        w_in, boxed = _boxes(weight, tile.n, block[1], tile.boxed)
        _linear[num_blocks * num_columns,](
            x_in, row_scales, w_in, scales, y, num_rows, num_blocks, num_columns, row_scales.stride(1),
            X_BOXED=x_boxed, BOXED=boxed, **_sizes(tile, block, columns, out, weight.device),
        )  # fmt: skip
    return y


def gated(x: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """silu(gate) * up of `linear` with a weight [gate | up, K]."""
    if 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block, gated=True)
    return silu_mul(linear(x, weight, scales, block))


def experts(
    x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """See `fp8.experts_reference`. Blocks are powers of two; the rows of w13's divide I. `tiles`: others than usual."""
    (num_experts, _, inner), x = w2.values.shape, x if x.stride(1) == 1 else x.contiguous()
    if not ids.numel() or not num_experts:
        return torch.zeros_like(x)
    assert inner % w13.block[0] == 0, f"a block of {w13.block[0]} rows would hold both halves of {inner}"
    ids, weights = ids.contiguous(), weights.contiguous()
    if tiles is None and few.pays(ids.numel(), num_experts):
        return few.experts(x, w13, w2, ids, weights)
    tiles = tiles or tiles_of(ids.numel() / num_experts)
    by_expert, group = sort_rows(ids, num_experts, tiles.up.m), w2.block[1]
    rows = (ids.numel(), inner, group, x.device)
    x_in = quantize(x, w13.block[1])
    if tiles.up.n == group:
        h = empty(*rows)
        _launch(x_in, w13, h[0], h[1], by_expert, tiles.up, ids.shape[1], True, x.dtype)
    else:
        wide = x.new_empty(ids.numel(), inner)
        _launch(x_in, w13, wide, None, by_expert, tiles.up, ids.shape[1], True, x.dtype)
        h = quantize(wide, group)
    y = x.new_empty(ids.numel(), x.shape[1])
    _launch(h, w2, y, None, by_expert, tiles.down, 1, False, x.dtype)
    return combine(y, ids, weights)


def _launch(
    x: Quantized, w: Fp8Weight, y: Tensor, y_scales: Tensor | None, by_expert: Sorted, tile: Tile, fold: int,
    gates: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    """One grouped product into y, or with `y_scales` into its quantised form; rounded to `dtype` in any case."""
    (values, scales), num_blocks, out = x, len(by_expert.blocks), y.shape[1]
    num_columns = triton.cdiv(out, tile.n)
    w_in, boxed = _boxes(w.values.flatten(0, 1), tile.n, w.block[1], tile.boxed)
    _grouped[num_blocks * num_columns,](
        values, scales, w_in, w.scales, y, y_scales, by_expert.rows, by_expert.blocks, num_blocks, num_columns,
        scales.stride(1), 0 if y_scales is None else y_scales.stride(1), FOLD=fold, GATED=gates,
        QUANTIZES=y_scales is not None, DTYPE=TYPES[dtype], BOXED=boxed,
        **_sizes(tile, w.block, values.shape[1], out, values.device),
    )  # fmt: skip
