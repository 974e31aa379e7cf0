"""Products of few rows with fp8 weights in blocks: bound by memory, each weight is read once; see `fp8.py`.

A program takes N whole rows of a weight, K columns at a time: G groups of as many neighbours as a block has columns. It
quantises the inputs itself, while its weights are on their way, adds up the products of a group in fp32 and scales that
sum, as the tiles of `triton_fp8.py` do; more rows go there. M rows of x, R routed rows, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fp8 import Block, Fp8Weight
from tessera.ops.precision import kept_in
from tessera.ops.triton_common import chained, follow
from tessera.ops.triton_fp8_rows import rounded

ROWS = 4  # of a product; more are tiles
FEW, SHARED = 16, 6  # routed rows, or 1 / SHARED of the experts: what several rows share is read by each of them


@dataclass(frozen=True, slots=True)
class Tile:
    """`numbers` of a weight that a program holds at once, at most `k` of a row, and its warps."""

    numbers: int
    k: int
    warps: int

    def of(self, depth: int, group: int, parts: int = 1) -> dict[str, int]:
        """N, G and warps for weights of `depth` columns, `parts` of them side by side."""
        k = max(min(triton.next_power_of_2(depth), self.k), group)
        return {"N": max(self.numbers // (k * parts), 1), "G": k // group, "num_warps": self.warps}


LINEAR, UP, DOWN = Tile(16384, 4096, 8), Tile(8192, 2048, 4), Tile(16384, 2048, 8)


@triton.jit
def _weights(w, row, live, k, G: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """[..., G, GROUP] of the rows `row` [...] of a weight from column k on; it takes no place in the cache."""
    inner = k + tl.arange(0, G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = w + tl.expand_dims(tl.expand_dims(row * COLUMNS, -1), -1) + inner
    shown = tl.expand_dims(tl.expand_dims(live, -1), -1) & (inner < COLUMNS)
    return tl.load(at, mask=shown, other=0.0, eviction_policy="evict_first")


@triton.jit
def _rounded(x, live, k, G: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns k .. of the row at x as products see them: [G, GROUP] of fp8's numbers in fp32, and their scales [G]."""
    inner = k + tl.arange(0, G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x + inner, mask=live & (inner < COLUMNS), other=0.0).to(tl.float32)
    value, scale = rounded(x)
    return value.to(tl.float8e4nv).to(tl.float32), scale


@triton.jit
def _products(
    weights, ws, column, live, k, values, scales, G: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[N]: weights [N, G, GROUP] of the rows `column` times `values` [G, GROUP], scaled group by group."""
    group = k // BLOCK_K + tl.arange(0, G)
    count: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    at = ws + (column // BLOCK_N)[:, None] * count + group[None, :]
    scale = tl.load(at, mask=live[:, None] & (group < count)[None, :], other=0.0)
    return tl.sum(tl.sum(weights.to(tl.float32) * values[None, :, :], 2) * (scale * scales[None, :]), 1)


@triton.jit
def _add(
    total, weights, x, x_row, ws, column, live, k, M: tl.constexpr, MP: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total [N, MP] + what columns k .. of a weight give with M rows of x."""
    nth = tl.arange(0, MP)[None, :]
    for m in tl.static_range(M):
        values, scales = _rounded(x + m * x_row, True, k, G, GROUP, COLUMNS)
        part = _products(weights, ws, column, live, k, values, scales, G, COLUMNS, BLOCK_N, GROUP)
        total += tl.where(nth == m, part[:, None], 0.0)
    return total


@triton.jit
def _linear(
    x, w, ws, y, x_row, out, COLUMNS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """y [M, out] = x w; GATED: silu of that times the product with the `out` rows of w that follow."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    live, row = column < out, column.to(tl.int64)
    weights = _weights(w, row, live, 0, G, GROUP, COLUMNS)
    if GATED:
        ups = _weights(w, out + row, live, 0, G, GROUP, COLUMNS)
    follow()
    first, second = tl.zeros([N, MP], tl.float32), tl.zeros([N, MP], tl.float32)
    first = _add(first, weights, x, x_row, ws, column, live, 0, M, MP, G, COLUMNS, BLOCK_N, GROUP)
    if GATED:
        second = _add(second, ups, x, x_row, ws, out + column, live, 0, M, MP, G, COLUMNS, BLOCK_N, GROUP)
    for k in range(G * GROUP, COLUMNS, G * GROUP):  # other programs' loads are on their way meanwhile
        weights = _weights(w, row, live, k, G, GROUP, COLUMNS)
        first = _add(first, weights, x, x_row, ws, column, live, k, M, MP, G, COLUMNS, BLOCK_N, GROUP)
        if GATED:
            ups = _weights(w, out + row, live, k, G, GROUP, COLUMNS)
            second = _add(second, ups, x, x_row, ws, out + column, live, k, M, MP, G, COLUMNS, BLOCK_N, GROUP)
    if GATED:
        first = first / (1 + tl.exp(-first)) * second
    nth = tl.arange(0, MP)[None, :]
    tl.store(y + nth * out + column[:, None], first.to(y.dtype.element_ty), mask=live[:, None] & (nth < M))


@triton.jit
def _gate_up(
    x, w, ws, h, ids, x_row, HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """h [R, I] = silu(x w1) * (x w3): program (columns, routed row)."""
    follow()
    row = tl.program_id(1)
    expert = tl.load(ids + row).to(tl.int64)
    if expert < 0:
        return
    column = tl.program_id(0) * N + tl.arange(0, N)
    live = column < INNER
    w += expert * (2 * INNER * HIDDEN)
    ws += expert * ((2 * INNER + BLOCK_N - 1) // BLOCK_N * ((HIDDEN + GROUP - 1) // GROUP))
    gate, up = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for k in range(0, HIDDEN, G * GROUP):
        first = _weights(w, column, live, k, G, GROUP, HIDDEN)
        second = _weights(w, INNER + column, live, k, G, GROUP, HIDDEN)
        token = (row // TOP_K).to(tl.int64)
        values, scales = _rounded(x + token * x_row, True, k, G, GROUP, HIDDEN)
        gate += _products(first, ws, column, live, k, values, scales, G, HIDDEN, BLOCK_N, GROUP)
        up += _products(second, ws, INNER + column, live, k, values, scales, G, HIDDEN, BLOCK_N, GROUP)
    made = gate / (1 + tl.exp(-gate)) * up
    tl.store(h + row.to(tl.int64) * INNER + column, made.to(h.dtype.element_ty), mask=live)


@triton.jit
def _down(
    h, w, ws, ids, weights, out, ROUNDED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """out [T, H]: program (columns, token) adds up the token's experts in their order."""
    follow()
    token, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * N + tl.arange(0, N)
    of_one: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N * ((INNER + GROUP - 1) // GROUP)
    total = tl.zeros([N], tl.float32)
    for j in tl.static_range(TOP_K):
        row = token * TOP_K + j
        expert = tl.load(ids + row).to(tl.int64)
        held, one = expert >= 0, tl.maximum(expert, 0)
        live = (column < HIDDEN) & held
        y = tl.zeros([N], tl.float32)
        for k in range(0, INNER, G * GROUP):
            part = _weights(w + one * (HIDDEN * INNER), column, live, k, G, GROUP, INNER)
            values, scales = _rounded(h + row * INNER, held, k, G, GROUP, INNER)
            y += _products(part, ws + one * of_one, column, live, k, values, scales, G, INNER, BLOCK_N, GROUP)
        if ROUNDED:  # as where there are more rows
            y = y.to(h.dtype.element_ty).to(tl.float32)
        total += tl.where(held, y * tl.load(weights + row).to(tl.float32), 0.0)
    tl.store(out + token * HIDDEN + column, total.to(out.dtype.element_ty), mask=column < HIDDEN)


def linear(
    x: Tensor, weight: Tensor, scales: Tensor, block: Block, gated: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """See `fp8.linear_reference`: x of up to `ROWS` rows. `block`: powers of two. `gated`: silu(gate) * up of a weight
    [gate | up, K] -> [M, out / 2]. `dtype`: of the result (x's)."""
    (rows, depth), parts = x.shape, 2 if gated else 1
    out, sizes = len(weight) // parts, LINEAR.of(depth, block[1], parts)
    x, y = x if x.stride(1) == 1 else x.contiguous(), x.new_empty(rows, out, dtype=dtype)
    _linear[triton.cdiv(out, sizes["N"]),](
        x, weight, scales, y, x.stride(0), out, COLUMNS=depth, M=rows, MP=triton.next_power_of_2(rows),
        GATED=gated, BLOCK_N=block[0], GROUP=block[1], **sizes, **chained(x.device),
    )  # fmt: skip
    return y


def pays(num_rows: int, num_experts: int) -> bool:
    """Whether so few routed rows come out sooner this way."""
    return num_rows <= max(FEW, num_experts // SHARED)


def experts(
    x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor, unrounded: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See `fp8.experts_reference`: two launches."""
    (num_tokens, hidden), inner, top_k = x.shape, w2.values.shape[2], ids.shape[1]
    h, out = x.new_empty(ids.numel(), inner), x.new_empty(x.shape, dtype=kept_in(x.dtype, unrounded, dtype))
    shape = {"HIDDEN": hidden, "INNER": inner, "TOP_K": top_k}
    shape |= chained(x.device)
    (step, group), sizes = w13.block, UP.of(hidden, w13.block[1])
    _gate_up[triton.cdiv(inner, sizes["N"]), ids.numel()](
        x, w13.values, w13.scales, h, ids, x.stride(0), BLOCK_N=step, GROUP=group, **shape, **sizes
    )
    (step, group), sizes = w2.block, DOWN.of(inner, w2.block[1])
    _down[triton.cdiv(hidden, sizes["N"]), num_tokens](
        h, w2.values, w2.scales, ids, weights, out, ROUNDED=not unrounded, BLOCK_N=step, GROUP=group, **shape, **sizes
    )
    return out
