"""Products of few rows with a weight: bound by memory, so each weight is read once, by programs that hold whole rows of
it. Nothing is joined across programs: a sum is taken in one order, whatever the batch, and on every run.

M rows of x; N rows of the weight (outputs) and K of its columns at a time in a program. The weights of a program are on
their way before it waits for x. More rows than `ROWS` go to the library, whose tiles multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.linear import PackedLinear, linear, widened
from tessera.ops.tied import Ends, plain_rows
from tessera.ops.triton_common import chained, follow, num_processors
from tessera.ops.triton_fused import silu_mul

ROWS = 4
HEAD_TILE = 8192  # numbers of a head's weight that a program takes
WAVES = 2  # programs a multiprocessor that a small weight is cut into at least


@dataclass(frozen=True, slots=True)
class Tile:
    """`numbers` of a weight that a program holds at once, at most `k` of a row, and its warps."""

    numbers: int
    k: int
    warps: int

    def of(self, out: int, depth: int, processors: int) -> tuple[int, int]:
        """(N, K) for a weight [out, depth]."""
        k = min(triton.next_power_of_2(depth), self.k)
        fair = triton.next_power_of_2(max(out // (WAVES * processors), 1))
        return max(min(self.numbers // k, fair), 1), k


@dataclass(frozen=True, slots=True)
class Tiles:
    """Those for weights of up to `depth` columns: of a product, and of gate and up (`numbers` of each) together."""

    depth: float
    one: Tile
    gated: Tile


TILES = (
    Tiles(2048, Tile(2048, 1024, 1), Tile(2048, 1024, 1)),
    Tiles(4096, Tile(4096, 2048, 1), Tile(2048, 2048, 1)),
    Tiles(float("inf"), Tile(8192, 4096, 4), Tile(8192, 4096, 4)),
)


def tiles_of(depth: int) -> Tiles:
    """The tiles for a weight of `depth` columns."""
    return next(tiles for tiles in TILES if depth <= tiles.depth)


@triton.jit
def weights_at(w, column, k, inner, OUT: tl.constexpr, DEPTH: tl.constexpr):
    """[N, K] of a weight, which is read once: it takes no place in the cache."""
    shown = (column < OUT)[:, None] & (k + inner < DEPTH)[None, :]
    at = w + column.to(tl.int64)[:, None] * DEPTH + (k + inner)[None, :]
    return tl.load(at, mask=shown, other=0.0, eviction_policy="evict_first")


@triton.jit
def add_products(acc, weights, x, x_row, k, inner, DEPTH: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """acc [N, MP] + weights [N, K] times columns k + inner of x [M, DEPTH]."""
    nth, wide = tl.arange(0, MP)[None, :], weights.to(tl.float32)
    for m in tl.static_range(M):
        row = tl.load(x + m * x_row + k + inner, mask=k + inner < DEPTH, other=0.0).to(tl.float32)
        acc += tl.where(nth == m, tl.sum(wide * row[None, :], 1)[:, None], 0.0)
    return acc


@triton.jit
def _product(
    x, w, bias, y, x_row, OUT: tl.constexpr, DEPTH: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """y [M, out] = x w.T + bias; GATED: silu of that times the product with the OUT rows of w that follow."""
    column, inner = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    last: tl.constexpr = (DEPTH - 1) // K * K
    up = w + OUT * DEPTH
    a = weights_at(w, column, 0, inner, OUT, DEPTH)
    if GATED:
        b = weights_at(up, column, 0, inner, OUT, DEPTH)
    follow()
    first, second = tl.zeros([N, MP], tl.float32), tl.zeros([N, MP], tl.float32)
    for k in range(0, last, K):
        next_a = weights_at(w, column, k + K, inner, OUT, DEPTH)
        if GATED:
            next_b = weights_at(up, column, k + K, inner, OUT, DEPTH)
        first = add_products(first, a, x, x_row, k, inner, DEPTH, M, MP)
        a = next_a
        if GATED:
            second = add_products(second, b, x, x_row, k, inner, DEPTH, M, MP)
            b = next_b
    first = add_products(first, a, x, x_row, last, inner, DEPTH, M, MP)
    if GATED:
        second = add_products(second, b, x, x_row, last, inner, DEPTH, M, MP)
        first = first / (1 + tl.exp(-first)) * second
    if BIASED:
        first += tl.load(bias + column, mask=column < OUT, other=0.0).to(tl.float32)[:, None]
    nth = tl.arange(0, MP)[None, :]
    at = y + nth * OUT + column[:, None]
    tl.store(at, first.to(y.dtype.element_ty), mask=(column < OUT)[:, None] & (nth < M))


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` is for this product."""
    return 0 < x.numel() <= ROWS * weight.shape[1] and x.dtype == weight.dtype != torch.float64


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gated: bool = False,
    tile: Tile | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K], weight [out, K] without gaps -> [M, out]; `gated`: silu(gate) * up of a weight [gate | up, K] ->
    [M, out / 2]. Up to float32. `tile` overrides what the table says; `dtype`: of the result (x's).
    """
    assert weight.is_contiguous(), "whole weights"
    (rows, depth), out = x.shape, weight.shape[0] // (2 if gated else 1)
    x, y = x if x.stride(1) == 1 else x.contiguous(), x.new_empty(rows, out, dtype=dtype)
    tiles = tiles_of(depth)
    tile = tile or (tiles.gated if gated else tiles.one)
    n, k = tile.of(out, depth, num_processors(x.device))
    _product[triton.cdiv(out, n),](
        x, weight, bias, y, x.stride(0), OUT=out, DEPTH=depth, M=rows, MP=triton.next_power_of_2(rows), N=n, K=k,
        GATED=gated, BIASED=bias is not None, num_warps=tile.warps, **chained(x.device),
    )  # fmt: skip
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `linear.linear`."""
    if not pays(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return few_rows(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


def unrounded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `linear.unrounded`."""
    if pays(x, weight):
        return few_rows(x.flatten(0, -2), weight, bias, dtype=torch.float32).unflatten(0, x.shape[:-1])
    if x.is_cuda and bias is None and x.element_size() == 2:
        return torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])
    return widened(x, weight, bias)


def gated_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `fused.gated_product`: x [M, K]."""
    if packed.gated is not None and packed.below is None:
        return packed.gated(x)
    if packed.bias is None and pays(x, packed.weight):
        return few_rows(x, packed.weight, gated=True)
    return silu_mul(linear(x, packed))


@triton.jit
def _by_head(
    x, w, out, x_row, x_head, w_head, w_row,
    H: tl.constexpr, INNER: tl.constexpr, OUT: tl.constexpr, PADDED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (head, N columns)."""
    head, i, column = tl.program_id(0), tl.arange(0, PADDED), tl.program_id(1) * N + tl.arange(0, N)
    shown = (i < INNER)[:, None] & (column < OUT)[None, :]
    weights = tl.load(w + head * w_head + i[:, None] * w_row + column[None, :], mask=shown, other=0.0).to(tl.float32)
    follow()
    for m in tl.static_range(M):
        row = tl.load(x + m * x_row + head * x_head + i, mask=i < INNER, other=0.0).to(tl.float32)
        y = tl.sum(weights * row[:, None], 0)
        tl.store(out + (m * H + head) * OUT + column, y.to(out.dtype.element_ty), mask=column < OUT)


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, I] times weight [H, I, J] of each head -> [T, H, J]; the last dims are dense."""
    (rows, heads, inner), columns = x.shape, weight.shape[2]
    if not 0 < rows <= ROWS or x.dtype == torch.float64:
        return torch.einsum("thi,hij->thj", x, weight)
    assert x.stride(2) == weight.stride(2) == 1, "neighbours in a row"
    out, padded = x.new_empty(rows, heads, columns), triton.next_power_of_2(inner)
    n = min(triton.next_power_of_2(columns), max(HEAD_TILE // padded, 1))
    _by_head[heads, triton.cdiv(columns, n)](
        x, weight, out, *x.stride()[:2], *weight.stride()[:2],
        H=heads, INNER=inner, OUT=columns, PADDED=padded, M=rows, N=n, num_warps=4, **chained(x.device),
    )  # fmt: skip
    return out


def pack(weight: Tensor, bias: Tensor | None = None, packs: bool = True) -> PackedLinear:
    """See `linear.pack_reference`: the weight stays as it is."""
    return PackedLinear(weight, bias, product, unrounded=unrounded)


def tie(weight: Tensor) -> Ends:
    """See `tied.tie_reference`."""
    return Ends(plain_rows(weight), pack(weight))
