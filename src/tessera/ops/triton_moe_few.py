"""The experts' MLPs for few rows: nothing is sorted, each routed row reads its expert's weights as a vector product.

Bound by memory: a program has all the weight bytes of its tile in flight at once. R routed rows, H hidden,
I intermediate, k experts a token; N columns and K products a tile. A shared expert of S * I is S further experts, which
every token chooses: R + T * S rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fused import Shared
from tessera.ops.moe import Dtype
from tessera.ops.precision import kept_in
from tessera.ops.triton_common import chained, follow
from tessera.ops.triton_linear import Tile, add_products, weights_at

FEW, SHARED = 16, 6  # routed rows, or 1 / SHARED of the experts: what several rows share is read by each of them
UP = Tile(2048, 1024, 1)  # numbers of each of the two halves
DOWN = Tile(32768, 2048, 8)  # numbers of the weights of all of a token's experts
JOINED = 2  # tokens up to which the shared expert is read once for each of them


def pays(num_rows: int, num_experts: int) -> bool:
    """Whether so few routed rows come out sooner this way."""
    return num_rows <= max(FEW, num_experts // SHARED)


def joins(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, shared: Shared | None) -> bool:
    """Whether `few_experts` takes the shared expert along, as so many further ones."""
    few = 0 < len(x) <= JOINED and len(w13) > 0 and pays(ids.numel(), len(w13))
    return few and w13.is_contiguous() and w2.is_contiguous() and parts_of(shared, w2) is not None


def parts_of(shared: Shared | None, w2: Tensor) -> int | None:
    """S: of how many of the experts w2 [E, H, I] the shared one consists; None where it must be computed apart."""
    if shared is None:
        return 0
    weight, inner = shared.w_out.weight, w2.shape[2]
    plain = not weight.is_mkldnn and weight.dtype == w2.dtype and shared.w_in.bias is None and shared.w_out.bias is None
    return weight.shape[1] // inner if plain and weight.shape[1] % inner == 0 else None


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up(
    x_ptr, w_ptr, shared_ptr, h_ptr, ids_ptr, stride_x, num_rows,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """h [R + T * S, I] = silu(x w1) * (x w3): the routed rows, then the parts of the shared expert of each token."""
    follow()
    row = tl.program_id(1)
    expert = tl.load(ids_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    if expert < 0:
        return
    token, gate_at, up_at = row // TOP_K, w_ptr + expert * (2 * INNER * HIDDEN), INNER * HIDDEN
    if PARTS > 0:
        own = row - num_rows
        token = tl.where(own < 0, token, own // PARTS)
        gate_at = tl.where(own < 0, gate_at, shared_ptr + own % PARTS * (INNER * HIDDEN))
        up_at = tl.where(own < 0, up_at, PARTS * INNER * HIDDEN)
    column, inner = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    x = x_ptr + token.to(tl.int64) * stride_x
    last: tl.constexpr = (HIDDEN - 1) // K * K
    gate, up = tl.zeros([N, 1], tl.float32), tl.zeros([N, 1], tl.float32)
    w1 = weights_at(gate_at, column, 0, inner, INNER, HIDDEN)
    w3 = weights_at(gate_at + up_at, column, 0, inner, INNER, HIDDEN)
    for k in range(0, last, K):
        next_w1 = weights_at(gate_at, column, k + K, inner, INNER, HIDDEN)
        next_w3 = weights_at(gate_at + up_at, column, k + K, inner, INNER, HIDDEN)
        gate = add_products(gate, w1, x, 0, k, inner, HIDDEN, 1, 1)
        up = add_products(up, w3, x, 0, k, inner, HIDDEN, 1, 1)
        w1, w3 = next_w1, next_w3
    gate = add_products(gate, w1, x, 0, last, inner, HIDDEN, 1, 1)
    up = add_products(up, w3, x, 0, last, inner, HIDDEN, 1, 1)
    h = gate / (1 + tl.exp(-gate)) * up
    at = h_ptr + row.to(tl.int64) * INNER + column[:, None]
    tl.store(at, h.to(h_ptr.dtype.element_ty), mask=(column < INNER)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _down(
    h_ptr, w_ptr, shared_ptr, ids_ptr, weights_ptr, x_ptr, gate_ptr, out_ptr, stride_x, num_rows,
    HIDDEN: tl.constexpr, HIDDEN_PADDED: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr, ROUNDED: tl.constexpr, K_PADDED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [T, H]: N columns of all k experts of a token and of the shared one's parts side by side, then their sum."""
    token = tl.program_id(1).to(tl.int64)
    nth, at = tl.arange(0, K_PADDED), tl.arange(0, HIDDEN_PADDED)
    if GATED:
        gate = tl.load(gate_ptr + at, mask=at < HIDDEN, other=0.0)
    follow()
    expert = tl.load(ids_ptr + token * TOP_K + nth, mask=nth < TOP_K, other=-1).to(tl.int64)
    weight = tl.load(weights_ptr + token * TOP_K + nth, mask=nth < TOP_K, other=0.0).to(tl.float32)
    if GATED:
        x = tl.load(x_ptr + token * stride_x + at, mask=at < HIDDEN, other=0.0)
    column, inner = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    held, row = expert >= 0, token * TOP_K + nth
    w = w_ptr + (expert * (HIDDEN * INNER))[:, None, None] + column[None, :, None] * INNER
    if PARTS > 0:
        own = nth - TOP_K
        row = tl.where(own < 0, row, num_rows + token * PARTS + own)
        held = held | ((own >= 0) & (own < PARTS))
        of_shared = shared_ptr + (own * INNER)[:, None, None] + column[None, :, None] * (PARTS * INNER)
        w = tl.where((own < 0)[:, None, None], w, of_shared)
    shown = held[:, None, None] & (column < HIDDEN)[None, :, None]
    h, w = h_ptr + row[:, None] * INNER + inner[None, :], w + inner[None, None, :]
    y = tl.zeros([K_PADDED, N], tl.float32)
    for k in range(0, INNER, K):
        inside = k + inner < INNER
        w2 = tl.load(w + k, mask=shown & inside[None, None, :], other=0.0)
        a = tl.load(h + k, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(w2.to(tl.float32) * a[:, None, :], 2)
    if PARTS > 0:
        share = 1.0
        if GATED:
            share = 1.0 / (1.0 + tl.exp(-tl.sum(x.to(tl.float32) * gate.to(tl.float32), 0)))
        weight = tl.where((own >= 0) & (own < PARTS), share, weight)
    if ROUNDED:  # as where there are more rows
        y = tl.where((nth < TOP_K)[:, None], y.to(h_ptr.dtype.element_ty).to(tl.float32), y)
    out = tl.sum(y * weight[:, None], 0)
    tl.store(out_ptr + token * HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)


def few_experts(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, shared: Shared | None = None,
    up: Tile = UP, down: Tile = DOWN, unrounded: bool = False, dtype: Dtype = None,
) -> Tensor:  # fmt: skip
    """See `moe.mixture_of`: two launches. The shared expert must consist of `parts_of` others."""
    (num_tokens, hidden), (_, _, inner), top_k = x.shape, w2.shape, ids.shape[1]
    parts = parts_of(shared, w2)
    assert parts is not None, "a shared expert that stands apart"
    w_in, w_out, gate = (w13, w2, None) if shared is None else (shared.w_in.weight, shared.w_out.weight, shared.gate)
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows = ids.numel()
    h, out = (
        x.new_empty(num_rows + num_tokens * parts, inner),
        x.new_empty(num_tokens, hidden, dtype=kept_in(x.dtype, unrounded, dtype)),
    )
    sizes = {"HIDDEN": hidden, "INNER": inner, "TOP_K": top_k, "PARTS": parts, **chained(x.device)}
    k = min(triton.next_power_of_2(hidden), up.k)
    n = max(up.numbers // k, 1)
    _gate_up[triton.cdiv(inner, n), len(h)](
        x, w13, w_in, h, ids, x.stride(0), num_rows, N=n, K=k, num_warps=up.warps, **sizes
    )
    padded = triton.next_power_of_2(top_k + parts)
    k = min(triton.next_power_of_2(inner), down.k)
    n = max(down.numbers // (k * padded), 1)
    _down[triton.cdiv(hidden, n), num_tokens](
        h, w2, w_out, ids, weights, x, w2 if gate is None else gate.weight, out, x.stride(0), num_rows,
        HIDDEN_PADDED=triton.next_power_of_2(hidden), GATED=gate is not None, ROUNDED=not unrounded,
        K_PADDED=padded, N=n, K=k, num_warps=down.warps, **sizes,
    )  # fmt: skip
    return out
