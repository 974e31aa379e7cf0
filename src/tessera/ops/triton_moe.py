"""The experts' MLPs as grouped matrix products. T tokens, k experts a token, R = T * k routed rows, E experts,
H hidden, I intermediate; M, N, K a tile.

Rows are sorted by expert (`triton_sort`); a program multiplies at most M rows of one expert with N columns of its
weight. The sum over K is taken in the same order in every tile, and a token's experts are summed in its own order, so
that a row's result does not depend on what else is in the batch. Few rows go to `triton_moe_few`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tessera.ops import moe
from tessera.ops.fused import Shared, gated_mlp
from tessera.ops.moe import ROUNDED, Beside, Dtype, Kept, Made, Mixture
from tessera.ops.precision import kept_in
from tessera.ops.triton_combine import combine
from tessera.ops.triton_common import chained, dot, follow
from tessera.ops.triton_fused import add_gated
from tessera.ops.triton_linear import gated_product
from tessera.ops.triton_moe_few import few_experts, joins, pays
from tessera.ops.triton_sort import sort_rows


@dataclass(frozen=True, slots=True)
class Tile:
    """How a grouped product is cut: `group` blocks of rows go through all columns before the next ones. `boxed`: what
    lies in order is fetched by the tensor memory accelerator, in boxes, where its rows are aligned for it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 1
    boxed: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """Those of the two products, for up to `rows` rows of an expert on average. Their `m` is the same."""

    rows: float
    up: Tile
    down: Tile


TILES = (
    Tiles(4, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
    Tiles(16, Tile(32, 64, 128, 4, 3), Tile(32, 128, 128, 4, 3)),
    Tiles(110, Tile(64, 64, 128, 4, 2, 1, True), Tile(64, 128, 64, 4, 4)),
    Tiles(float("inf"), Tile(128, 128, 64, 8, 3, 1, True), Tile(128, 256, 64, 8, 3, 1, True)),
)
FP32 = Tiles(float("inf"), Tile(16, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2))


def tiles_of(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """The tiles for R routed rows over E experts."""
    if dtype == torch.float32:
        return FP32
    return next(t for t in TILES if num_rows <= t.rows * num_experts)


@triton.jit
def work_of(blocks_ptr, num_blocks, num_columns, GROUP: tl.constexpr):
    """(expert, first row, end, tile of columns) of this program, once what it reads is there."""
    follow()
    pid = tl.program_id(0)
    first = pid // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inside = pid % (GROUP * num_columns)
    at = blocks_ptr + (first + inside % size) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), inside // size


@triton.jit
def _rows(x, row, stride, held, k, inner, WIDTH: tl.constexpr):
    """[M, K]: columns k + inner of rows."""
    at = x + row.to(tl.int64)[:, None] * stride + (k + inner)[None, :]
    return tl.load(at, mask=held[:, None] & (k + inner < WIDTH)[None, :], other=0.0)


@triton.jit
def _columns(w, first, column, shown, k, inner, WIDTH: tl.constexpr):
    """[K, N]: numbers k + inner of rows `first + column` of all weights."""
    at = w + (first.to(tl.int64) + column[None, :]) * WIDTH + (k + inner)[:, None]
    return tl.load(at, mask=shown[None, :] & (k + inner < WIDTH)[:, None], other=0.0)


@triton.jit(do_not_specialize=["num_blocks"])
def _gate_up(
    x, w, h_ptr, rows_ptr, blocks_ptr, num_blocks, num_columns, stride_x,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, BOXED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h [R, I] = silu(x w1) * (x w3), w [E, 2I, H], in the order of experts."""
    expert, first, end, tile = work_of(blocks_ptr, num_blocks, num_columns, GROUP)
    if expert < 0:
        return
    at = first + tl.arange(0, M)
    held = at < end
    row = tl.load(rows_ptr + at, mask=held, other=0) // TOP_K
    column, inner = tile * N + tl.arange(0, N), tl.arange(0, K)
    shown = column < INNER
    if BOXED:
        both = tl.zeros([M, 2 * N], tl.float32)
        for k in tl.range(0, HIDDEN, K, num_stages=STAGES):
            a = _rows(x, row, stride_x, held, k, inner, HIDDEN)
            both = dot(a, w.load([2 * expert, tile * N, k]).reshape(2 * N, K).T, both)
        gate, up = tl.split(both.reshape(M, 2, N).permute(0, 2, 1))
    else:
        gate, up = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
        for k in tl.range(0, HIDDEN, K, num_stages=STAGES):
            a = _rows(x, row, stride_x, held, k, inner, HIDDEN)
            gate = dot(a, _columns(w, expert * (2 * INNER), column, shown, k, inner, HIDDEN), gate)
            up = dot(a, _columns(w, expert * (2 * INNER) + INNER, column, shown, k, inner, HIDDEN), up)
    h = gate / (1 + tl.exp(-gate)) * up
    h_at = h_ptr + at.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _down(
    h, w, y_ptr, rows_ptr, blocks_ptr, num_blocks, num_columns,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, BOXED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [R, H] = h w2, w [E, H, I], each row at its own place."""
    expert, first, end, tile = work_of(blocks_ptr, num_blocks, num_columns, GROUP)
    if expert < 0:
        return
    at = first + tl.arange(0, M)
    held = at < end
    row = tl.load(rows_ptr + at, mask=held, other=0).to(tl.int64)
    column, inner = tile * N + tl.arange(0, N), tl.arange(0, K)
    shown = column < HIDDEN
    y = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, INNER, K, num_stages=STAGES):
        if BOXED:  # rows from `end` on are another expert's: nobody uses them
            a, w2 = h.load([first, k]), w.load([expert * HIDDEN + tile * N, k]).T
        else:
            a = _rows(h, at, INNER, held, k, inner, INNER)
            w2 = _columns(w, expert * HIDDEN, column, shown, k, inner, INNER)
        y = dot(a, w2, y)
    y_at = y_ptr + row[:, None] * HIDDEN + column[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])


def experts(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, unrounded: bool = False, dtype: Dtype = None
) -> Tensor:
    """See `moe.experts_reference`; up to float32."""
    num_experts = len(w13)
    if not ids.numel() or not num_experts:
        return torch.zeros_like(x, dtype=kept_in(x.dtype, unrounded, dtype))
    ids, weights = ids.contiguous(), weights.contiguous()
    if pays(ids.numel(), num_experts):
        _expect_whole(x, w13, w2)
        return few_experts(x, w13, w2, ids, weights, unrounded=unrounded, dtype=dtype)
    return grouped_experts(x, w13, w2, ids, weights, tiles_of(ids.numel(), num_experts, x.dtype), unrounded, dtype)


def _expect_whole(x: Tensor, w13: Tensor, w2: Tensor) -> None:
    assert x.dtype == w13.dtype == w2.dtype != torch.float64, f"{x.dtype}, {w13.dtype}, {w2.dtype}"
    assert w13.is_contiguous(), "whole weights"
    assert w2.is_contiguous(), "whole weights"


def mixture_of(experts: Callable[..., Tensor]) -> Mixture:
    """`moe.mixture_of` these experts; with few tokens the shared one is among those that they visit."""
    apart = moe.mixture_of(experts, gated_product, add_gated)

    def mixture(
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        ids: Tensor,
        weights: Tensor,
        shared: Shared | None,
        made: Made | None = None,
        kept: Kept = ROUNDED,
    ) -> Tensor:
        """See `moe.mixture_of`; up to float32."""
        if shared is not None and made is None and joins(x, w13, w2, ids, shared):
            few = ids.contiguous(), weights.contiguous(), shared
            return few_experts(x, w13, w2, *few, unrounded=kept.rows, dtype=kept.total)
        return apart(x, w13, w2, ids, weights, shared, made, kept)

    return mixture


_apart = mixture_of(experts)


def mixture(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, shared: Shared | None,
    made: Made | None = None, kept: Kept = ROUNDED,
) -> Tensor:  # fmt: skip
    """See `moe.mixture_of`; up to float32. With many rows the shared expert's are added where the others are summed."""
    if shared is None or not len(w13) or pays(ids.numel(), len(w13)):
        return _apart(x, w13, w2, ids, weights, shared, made, kept)
    y = grouped_rows(x, w13, w2, ids, tiles_of(ids.numel(), len(w13), x.dtype), kept.rows)
    rows = gated_mlp(x, shared.w_in, shared.w_out, gated_product, kept.beside) if made is None else made()
    beside = Beside(rows, x, shared.gate)
    return combine(y, ids.contiguous(), weights.contiguous(), beside=beside, dtype=kept.total)


def _boxes(matrices: Tensor, tile: Tile, count: int = 1) -> tuple[Tensor | TensorDescriptor, bool]:
    """Matrices [.., rows, columns] as a product takes them: in boxes of N x K of `count` matrices, or as they are."""
    if not tile.boxed or matrices.shape[-1] * matrices.element_size() % 16:
        return matrices, False
    if count == 1:
        return TensorDescriptor.from_tensor(matrices.flatten(0, -2), [tile.n, tile.k]), True
    return TensorDescriptor.from_tensor(matrices.flatten(0, -3), [count, tile.n, tile.k]), True


def _cut(tile: Tile, boxed: bool) -> dict[str, object]:
    """What a grouped product is launched with."""
    return {
        "BOXED": boxed, "M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group, "STAGES": tile.stages,
        "num_warps": tile.warps,
    }  # fmt: skip


def grouped_experts(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, tiles: Tiles, unrounded: bool = False,
    dtype: Dtype = None,
) -> Tensor:  # fmt: skip
    """See `moe.experts_reference`: sort, two grouped products, sum."""
    return combine(grouped_rows(x, w13, w2, ids, tiles, unrounded), ids, weights, dtype=dtype)


def grouped_rows(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, tiles: Tiles, unrounded: bool = False) -> Tensor:
    """[T * k, H]: what each of its experts makes of a token; the rows of id -1 are not written."""
    _expect_whole(x, w13, w2)
    (_, hidden), (num_experts, _, inner), top_k = x.shape, w2.shape, ids.shape[1]
    x, up, down = x if x.stride(1) == 1 else x.contiguous(), tiles.up, tiles.down
    by_expert = sort_rows(ids, num_experts, up.m)
    rows, blocks, num_blocks = by_expert.rows, by_expert.blocks, len(by_expert.blocks)
    h = x.new_empty(ids.numel(), inner)
    y = x.new_empty(ids.numel(), hidden, dtype=torch.float32 if unrounded else x.dtype)
    sizes = {"rows_ptr": rows, "blocks_ptr": blocks, "num_blocks": num_blocks, "HIDDEN": hidden, "INNER": inner}
    sizes |= chained(x.device)
    columns, (w, boxed) = triton.cdiv(inner, up.n), _boxes(w13.unflatten(1, (2, inner)), up, 2)
    _gate_up[num_blocks * columns,](
        x=x, w=w, h_ptr=h, num_columns=columns, stride_x=x.stride(0), TOP_K=top_k, **sizes, **_cut(up, boxed)
    )
    columns, (w, boxed) = triton.cdiv(hidden, down.n), _boxes(w2, down)
    h_in = TensorDescriptor.from_tensor(h, [down.m, down.k]) if boxed else h
    _down[num_blocks * columns,](h=h_in, w=w, y_ptr=y, num_columns=columns, **sizes, **_cut(down, boxed))
    return y
