"""The experts' MLPs for few rows: nothing is sorted, each routed row reads its expert's weights as a vector product.

Bound by memory: a program has all the weight bytes of its tile in flight at once. R routed rows, H hidden,
I intermediate, k experts a token; N columns and K products a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

FEW, SHARED = 16, 6  # routed rows, or 1 / SHARED of the experts: what several rows share is read by each of them
UP_TILE, UP_WARPS = 4096, 4  # numbers of each of the two halves, and of a weight of the second product
DOWN_TILE, DOWN_WARPS = 32768, 8


def pays(num_rows: int, num_experts: int) -> bool:
    """Whether so few routed rows come out sooner this way."""
    return num_rows <= max(FEW, num_experts // SHARED)


@triton.jit
def _gate_up(
    x_ptr, w_ptr, h_ptr, ids_ptr, stride_x,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h [R, I] = silu(x w1) * (x w3)."""
    row = tl.program_id(1)
    expert = tl.load(ids_ptr + row).to(tl.int64)
    if expert < 0:
        return
    column, inner = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    shown = (column < INNER)[:, None]
    x = x_ptr + (row // TOP_K).to(tl.int64) * stride_x + inner
    w = w_ptr + expert * (2 * INNER * HIDDEN) + column[:, None] * HIDDEN + inner[None, :]
    gate, up = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for k in range(0, HIDDEN, K):
        inside = k + inner < HIDDEN
        w1 = tl.load(w + k, mask=shown & inside[None, :], other=0.0)
        w3 = tl.load(w + INNER * HIDDEN + k, mask=shown & inside[None, :], other=0.0)
        a = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate += tl.sum(w1.to(tl.float32) * a, 1)
        up += tl.sum(w3.to(tl.float32) * a, 1)
    h = gate / (1 + tl.exp(-gate)) * up
    tl.store(h_ptr + row.to(tl.int64) * INNER + column, h.to(h_ptr.dtype.element_ty), mask=column < INNER)


@triton.jit
def _down(
    h_ptr, w_ptr, ids_ptr, weights_ptr, out_ptr,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr,
    K_PADDED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [T, H]: N columns of all k experts of a token side by side, then their sum."""
    token = tl.program_id(1).to(tl.int64)
    nth = tl.arange(0, K_PADDED)
    expert = tl.load(ids_ptr + token * TOP_K + nth, mask=nth < TOP_K, other=-1).to(tl.int64)
    held = expert >= 0
    column, inner = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    shown = held[:, None, None] & (column < HIDDEN)[None, :, None]
    h = h_ptr + (token * TOP_K + nth)[:, None] * INNER + inner[None, :]
    w = w_ptr + (expert * (HIDDEN * INNER))[:, None, None] + column[None, :, None] * INNER + inner[None, None, :]
    y = tl.zeros([K_PADDED, N], tl.float32)
    for k in range(0, INNER, K):
        inside = k + inner < INNER
        w2 = tl.load(w + k, mask=shown & inside[None, None, :], other=0.0)
        a = tl.load(h + k, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(w2.to(tl.float32) * a[:, None, :], 2)
    y = y.to(h_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weights_ptr + token * TOP_K + nth, mask=held, other=0.0).to(tl.float32)
    out = tl.sum(y * weight[:, None], 0)
    tl.store(out_ptr + token * HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)


def few_experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """See `moe.experts_reference`: two launches."""
    (num_tokens, hidden), (_, _, inner), top_k = x.shape, w2.shape, ids.shape[1]
    x = x if x.stride(1) == 1 else x.contiguous()
    h, out = x.new_empty(ids.numel(), inner), x.new_empty(num_tokens, hidden)
    k = min(triton.next_power_of_2(hidden), 2048)
    n = max(UP_TILE // k, 1)
    _gate_up[triton.cdiv(inner, n), ids.numel()](
        x, w13, h, ids, x.stride(0), HIDDEN=hidden, INNER=inner, TOP_K=top_k, N=n, K=k, num_warps=UP_WARPS
    )
    padded = triton.next_power_of_2(top_k)
    k = min(triton.next_power_of_2(inner), 2048)
    n = max(DOWN_TILE // (k * padded), 1)
    _down[triton.cdiv(hidden, n), num_tokens](
        h, w2, ids, weights, out, HIDDEN=hidden, INNER=inner, TOP_K=top_k,
        K_PADDED=padded, N=n, K=k, num_warps=DOWN_WARPS,
    )  # fmt: skip
    return out
