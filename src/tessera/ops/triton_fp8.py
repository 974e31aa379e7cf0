"""Products of fp8 weights in blocks with activations quantised on the fly; see `fp8.py` for the scheme and the shapes.

A program adds up products of K neighbours in the tensor cores, K no larger than a block, and scales their sum in fp32:
the tensor cores' own sums of fp8 keep few digits, so none of them is longer than a block. M rows, N columns a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops import triton_fp8_few as few
from tessera.ops.fp8 import GROUP, LARGEST, SMALLEST, Block, Fp8Weight
from tessera.ops.triton_common import chained, dot, follow, num_processors
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_moe import combine, work_of
from tessera.ops.triton_sort import sort_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a tile, for up to `rows` rows (of an expert, on average); `gated`: columns of each half."""

    rows: float
    m: int
    n: int
    gated: int
    warps: int
    stages: int


TILES = (
    Tile(4, 16, 64, 32, 4, 4),
    Tile(16, 32, 64, 32, 4, 4),
    Tile(110, 64, 64, 64, 4, 4),
    Tile(float("inf"), 128, 128, 64, 8, 3),
)
NARROW = 32  # columns


def tile_of(rows: float) -> Tile:
    """For so many rows of a weight."""
    return next(t for t in TILES if rows <= t.rows)


def spread(tile: Tile, rows: int, out: int, processors: int) -> Tile:
    """The tile for `rows` of x and `out` of a weight: where there would be fewer programs than processors, more and
    narrower ones with more of the weight on its way. What a program adds up, and in which order, stays the same."""
    if triton.cdiv(out, tile.n) * triton.cdiv(rows, tile.m) >= processors or tile.n <= NARROW:
        return tile
    return replace(tile, n=NARROW, stages=2 * tile.stages)


@triton.jit
def _quantize(
    x_ptr, out_ptr, scales_ptr, stride,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr,
    GROUP: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """PADDED groups of one row."""
    follow()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * PADDED + tl.arange(0, PADDED)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * stride + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST) / LARGEST
    value = tl.minimum(tl.maximum(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), -LARGEST), LARGEST)
    tl.store(out_ptr + row * COLUMNS + column, value.to(out_ptr.dtype.element_ty), mask=column < COLUMNS)
    tl.store(scales_ptr + row * GROUPS + group, scale, mask=group < GROUPS)


def quantize(x: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """See `fp8.quantize`. Neighbours in a row are neighbours in memory."""
    (rows, columns), groups = x.shape, triton.cdiv(x.shape[1], group)
    assert x.stride(1) == 1 or columns == 1, "whole rows"
    values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if rows:
        padded = min(triton.next_power_of_2(groups), 16)
        _quantize[rows, triton.cdiv(groups, padded)](
            x, values, scales, x.stride(0), COLUMNS=columns, GROUPS=groups, PADDED=padded,
            GROUP=group, LARGEST=LARGEST, SMALLEST=SMALLEST, num_warps=4,
            **chained(x.device),
        )  # fmt: skip
    return values, scales


@triton.jit
def _scaled(
    total, x_ptr, xs_ptr, w_ptr, ws_ptr, row, held, first, shown, k,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """total [M, N] plus the products of columns k .. k + K - 1 with rows `first` .. of one weight (w_ptr, ws_ptr)."""
    column = first + tl.arange(0, N)
    inner = k + tl.arange(0, K)
    inside = inner < COLUMNS
    a = tl.load(x_ptr + row[:, None] * COLUMNS + inner[None, :], mask=held[:, None] & inside[None, :], other=0.0)
    w_at = w_ptr + column[None, :].to(tl.int64) * COLUMNS + inner[:, None]
    b = tl.load(w_at, mask=shown[None, :] & inside[:, None], other=0.0)
    xs = tl.load(xs_ptr + row * tl.cdiv(COLUMNS, GROUP) + k // GROUP, mask=held, other=0.0)
    count: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    if BLOCK_N % N == 0:  # they lie in one block: half the work beside the products
        scale = (xs * tl.load(ws_ptr + (first // BLOCK_N) * count + k // BLOCK_K))[:, None]
    else:
        ws = tl.load(ws_ptr + (column // BLOCK_N) * count + k // BLOCK_K, mask=shown, other=0.0)
        scale = xs[:, None] * ws[None, :]
    return total + dot(a, b, None) * scale


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x_ptr, xs_ptr, w_ptr, ws_ptr, y_ptr, num_rows,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [T, OUT] = x w."""
    follow()
    row, first = tl.program_id(1) * M + tl.arange(0, M), tl.program_id(0) * N
    column = first + tl.arange(0, N)
    held, shown = row < num_rows, column < OUT
    row = row.to(tl.int64)
    y = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        y = _scaled(y, x_ptr, xs_ptr, w_ptr, ws_ptr, row, held, first, shown, k, COLUMNS, BLOCK_N, BLOCK_K, N, K, GROUP)
    y_at = y_ptr + row[:, None] * OUT + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _grouped(
    x_ptr, xs_ptr, w_ptr, ws_ptr, y_ptr, rows_ptr, blocks_ptr, num_blocks, num_columns,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, FOLD: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [R, OUT]: row r times its expert's weight, from row r / FOLD of x; GATED: silu of a first OUT columns times a
    second OUT columns of the weight."""
    follow()
    expert, first, end, tile = work_of(blocks_ptr, num_blocks, num_columns, 1)
    if expert < 0:
        return
    at = first + tl.arange(0, M)
    held = at < end
    row = tl.load(rows_ptr + at, mask=held, other=0).to(tl.int64)
    column = tile * N + tl.arange(0, N)
    shown, x_row = column < OUT, row // FOLD
    total: tl.constexpr = 2 * OUT if GATED else OUT
    w_ptr += expert.to(tl.int64) * (total * COLUMNS)
    ws_ptr += expert.to(tl.int64) * (tl.cdiv(total, BLOCK_N) * tl.cdiv(COLUMNS, BLOCK_K))
    y, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for k in tl.range(0, COLUMNS, K, num_stages=STAGES):
        y = _scaled(
            y, x_ptr, xs_ptr, w_ptr, ws_ptr, x_row, held, tile * N, shown, k, COLUMNS, BLOCK_N, BLOCK_K, N, K, GROUP
        )
        if GATED:
            up = _scaled(
                up, x_ptr, xs_ptr, w_ptr, ws_ptr, x_row, held, OUT + tile * N, shown, k,
                COLUMNS, BLOCK_N, BLOCK_K, N, K, GROUP,
            )  # fmt: skip
    if GATED:
        y = y / (1 + tl.exp(-y)) * up
    y_at = y_ptr + row[:, None] * OUT + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


def _sizes(tile: Tile, n: int, block: Block, columns: int, out: int) -> dict[str, int]:
    return {
        "COLUMNS": columns, "OUT": out, "BLOCK_N": block[0], "BLOCK_K": block[1], "GROUP": block[1],
        "M": tile.m, "N": n, "K": block[1], "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip


def linear(x: Tensor, weight: Tensor, scales: Tensor, block: Block = (GROUP, GROUP)) -> Tensor:
    """See `fp8.linear_reference`. `block`: powers of two."""
    if 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block)
    y = x.new_empty(len(x), len(weight))
    if len(x):
        tile = spread(tile_of(len(x)), len(x), len(weight), num_processors(x.device))
        _linear[triton.cdiv(len(weight), tile.n), triton.cdiv(len(x), tile.m)](
            *quantize(x, block[1]),
            weight,
            scales,
            y,
            len(x),
            **_sizes(tile, tile.n, block, x.shape[1], len(weight)),
            **chained(x.device),
        )
    return y


def gated(x: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """silu(gate) * up of `linear` with a weight [gate | up, K]."""
    if 0 < len(x) <= few.ROWS:
        return few.linear(x, weight, scales, block, gated=True)
    return silu_mul(linear(x, weight, scales, block))


def experts(x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """See `fp8.experts_reference`. Blocks are powers of two; the rows of w13's divide I."""
    (_, hidden), (num_experts, _, inner), top_k = x.shape, w2.values.shape, ids.shape[1]
    if not ids.numel() or not num_experts:
        return torch.zeros_like(x)
    assert inner % w13.block[0] == 0, f"a block of {w13.block[0]} rows would hold both halves of {inner}"
    ids, weights = ids.contiguous(), weights.contiguous()
    if few.pays(ids.numel(), num_experts):
        return few.experts(x if x.stride(1) == 1 else x.contiguous(), w13, w2, ids, weights)
    tile = tile_of(ids.numel() / num_experts)
    by_expert = sort_rows(ids, num_experts, tile.m)
    h, y = x.new_empty(ids.numel(), inner), x.new_empty(ids.numel(), hidden)
    for source, w, target, fold in ((x, w13, h, top_k), (h, w2, y, 1)):
        n = tile.gated if source is x else tile.n
        columns = triton.cdiv(target.shape[1], n)
        _grouped[len(by_expert.blocks) * columns,](
            *quantize(source, w.block[1]), w.values, w.scales, target, by_expert.rows, by_expert.blocks,
            len(by_expert.blocks), columns, FOLD=fold, GATED=source is x,
            **_sizes(tile, n, w.block, source.shape[1], target.shape[1]), **chained(x.device),
        )  # fmt: skip
    return combine(y, ids, weights)
