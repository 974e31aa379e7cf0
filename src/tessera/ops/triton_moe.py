"""The experts' MLPs as grouped matrix products. T tokens, k experts a token, R = T * k routed rows, E experts,
H hidden, I intermediate; M, N, K a tile.

Rows are sorted by expert (`triton_sort`); a program multiplies at most M rows of one expert with N columns of its
weight. The sum over K is taken in the same order in every tile, and a token's experts are summed in its own order, so
that a row's result does not depend on what else is in the batch. Few rows go to `triton_moe_few`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.triton_common import dot
from tessera.ops.triton_moe_few import few_experts, pays
from tessera.ops.triton_sort import sort_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """How a grouped product is cut: `group` blocks of rows go through all columns before the next ones."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Those of the two products, for up to `rows` rows of an expert on average. Their `m` is the same."""

    rows: float
    up: Tile
    down: Tile


TILES = (
    Tiles(10, Tile(16, 64, 64, 4, 4, 1), Tile(16, 128, 64, 4, 4, 1)),
    Tiles(24, Tile(32, 64, 64, 4, 4, 1), Tile(32, 128, 64, 4, 4, 1)),
    Tiles(80, Tile(64, 64, 64, 4, 4, 1), Tile(64, 128, 64, 4, 4, 1)),
    Tiles(float("inf"), Tile(128, 128, 64, 8, 3, 8), Tile(128, 256, 64, 8, 3, 8)),
)
FP32 = Tiles(float("inf"), Tile(16, 32, 32, 4, 2, 1), Tile(16, 32, 32, 4, 2, 1))


def tiles_of(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """The tiles for R routed rows over E experts."""
    if dtype == torch.float32:
        return FP32
    return next(t for t in TILES if num_rows <= t.rows * num_experts)


@triton.jit
def _block(blocks_ptr, num_blocks, num_columns, GROUP: tl.constexpr):
    """(expert, first row, end, tile of columns) of this program."""
    pid = tl.program_id(0)
    first = pid // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inside = pid % (GROUP * num_columns)
    at = blocks_ptr + (first + inside % size) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), inside // size


@triton.jit
def _gate_up(
    x_ptr, w_ptr, h_ptr, rows_ptr, blocks_ptr, num_blocks, num_columns, stride_x,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h [R, I] = silu(x w1) * (x w3), w [E, 2I, H]: a program computes N columns of both and their product."""
    expert, first, end, tile = _block(blocks_ptr, num_blocks, num_columns, GROUP)
    if expert < 0:
        return
    at = first + tl.arange(0, M)
    held = at < end
    row = tl.load(rows_ptr + at, mask=held, other=0)
    column, inner = tile * N + tl.arange(0, N), tl.arange(0, K)
    shown = column < INNER
    x = x_ptr + (row // TOP_K).to(tl.int64)[:, None] * stride_x + inner[None, :]
    w = w_ptr + expert.to(tl.int64) * (2 * INNER * HIDDEN) + column[None, :] * HIDDEN + inner[:, None]
    gate, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for k in tl.range(0, HIDDEN, K, num_stages=STAGES):
        inside = k + inner < HIDDEN
        a = tl.load(x + k, mask=held[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + k, mask=shown[None, :] & inside[:, None], other=0.0)
        gate = dot(a, b, gate)
        b = tl.load(w + INNER * HIDDEN + k, mask=shown[None, :] & inside[:, None], other=0.0)
        up = dot(a, b, up)
    h = gate / (1 + tl.exp(-gate)) * up
    h_at = h_ptr + row.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


@triton.jit
def _down(
    h_ptr, w_ptr, y_ptr, rows_ptr, blocks_ptr, num_blocks, num_columns,
    HIDDEN: tl.constexpr, INNER: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [R, H] = h w2, w [E, H, I]."""
    expert, first, end, tile = _block(blocks_ptr, num_blocks, num_columns, GROUP)
    if expert < 0:
        return
    at = first + tl.arange(0, M)
    held = at < end
    row = tl.load(rows_ptr + at, mask=held, other=0).to(tl.int64)
    column, inner = tile * N + tl.arange(0, N), tl.arange(0, K)
    shown = column < HIDDEN
    h = h_ptr + row[:, None] * INNER + inner[None, :]
    w = w_ptr + expert.to(tl.int64) * (HIDDEN * INNER) + column[None, :] * INNER + inner[:, None]
    y = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, INNER, K, num_stages=STAGES):
        inside = k + inner < INNER
        a = tl.load(h + k, mask=held[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + k, mask=shown[None, :] & inside[:, None], other=0.0)
        y = dot(a, b, y)
    y_at = y_ptr + row[:, None] * HIDDEN + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


@triton.jit
def _combine(
    y_ptr, ids_ptr, weights_ptr, out_ptr,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """out [T, H]: a token's rows times their weights, added in fp32 in the order of its experts."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    shown = column < HIDDEN
    out = tl.zeros([N], tl.float32)
    for j in tl.static_range(TOP_K):
        row = token * TOP_K + j
        held = tl.load(ids_ptr + row) >= 0
        y = tl.load(y_ptr + row * HIDDEN + column, mask=shown & held, other=0.0).to(tl.float32)
        out += y * tl.load(weights_ptr + row).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask=shown)


def experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """See `moe.experts_reference`; up to float32."""
    num_experts = len(w13)
    if not ids.numel() or not num_experts:
        return torch.zeros_like(x)
    assert x.dtype == w13.dtype == w2.dtype != torch.float64, f"{x.dtype}, {w13.dtype}, {w2.dtype}"
    assert w13.is_contiguous(), "whole weights"
    assert w2.is_contiguous(), "whole weights"
    ids, weights = ids.contiguous(), weights.contiguous()
    if pays(ids.numel()):
        return few_experts(x, w13, w2, ids, weights)
    return grouped_experts(x, w13, w2, ids, weights, tiles_of(ids.numel(), num_experts, x.dtype))


def grouped_experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, tiles: Tiles) -> Tensor:
    """See `moe.experts_reference`: sort, two grouped products, sum."""
    (num_tokens, hidden), (num_experts, _, inner), top_k = x.shape, w2.shape, ids.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    by_expert = sort_rows(ids, num_experts, tiles.up.m)
    num_blocks = len(by_expert.blocks)
    h, y = x.new_empty(ids.numel(), inner), x.new_empty(ids.numel(), hidden)
    up, down = tiles.up, tiles.down
    columns = triton.cdiv(inner, up.n)
    _gate_up[num_blocks * columns,](
        x, w13, h, by_expert.rows, by_expert.blocks, num_blocks, columns, x.stride(0),
        HIDDEN=hidden, INNER=inner, TOP_K=top_k,
        M=up.m, N=up.n, K=up.k, GROUP=up.group, STAGES=up.stages, num_warps=up.warps,
    )  # fmt: skip
    columns = triton.cdiv(hidden, down.n)
    _down[num_blocks * columns,](
        h, w2, y, by_expert.rows, by_expert.blocks, num_blocks, columns,
        HIDDEN=hidden, INNER=inner,
        M=down.m, N=down.n, K=down.k, GROUP=down.group, STAGES=down.stages, num_warps=down.warps,
    )  # fmt: skip
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    width = min(triton.next_power_of_2(hidden), 1024)
    _combine[num_tokens, triton.cdiv(hidden, width)](
        y, ids, weights, out, HIDDEN=hidden, TOP_K=top_k, N=width, num_warps=4
    )
    return out
