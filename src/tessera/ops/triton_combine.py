"""What a token's experts made of it, added up, with what every token visits. T tokens, k experts a token, H hidden."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.moe import Beside, Dtype
from tessera.ops.triton_common import chained, follow


@triton.jit
def _combine(
    y_ptr, ids_ptr, weights_ptr, places_ptr, beside_ptr, x_ptr, gate_ptr, out_ptr, stride_x,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr, PLACED: tl.constexpr, BESIDE: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """out [T, H]: a token's rows times their weights, added in fp32 in the order of its experts; its row beside."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    shown = column < HIDDEN
    if GATED:
        gate = tl.load(gate_ptr + column, mask=shown, other=0.0).to(tl.float32)
    follow()
    out = tl.zeros([N], tl.float32)
    for j in tl.static_range(TOP_K):
        row = token * TOP_K + j
        held = tl.load(ids_ptr + row) >= 0
        at = tl.load(places_ptr + row).to(tl.int64) if PLACED else row
        y = tl.load(y_ptr + at * HIDDEN + column, mask=shown & held, other=0.0).to(tl.float32)
        out += y * tl.load(weights_ptr + row).to(tl.float32)
    if BESIDE:
        beside = tl.load(beside_ptr + token * HIDDEN + column, mask=shown, other=0.0).to(tl.float32)
        if GATED:
            x = tl.load(x_ptr + token * stride_x + column, mask=shown, other=0.0).to(tl.float32)
            beside *= 1 / (1 + tl.exp(-tl.sum(x * gate)))
        out += beside
    tl.store(out_ptr + token * HIDDEN + column, out.to(out_ptr.dtype.element_ty), mask=shown)


def combine(
    y: Tensor, ids: Tensor, weights: Tensor, places: Tensor | None = None, beside: Beside | None = None,
    dtype: Dtype = None,
) -> Tensor:  # fmt: skip
    """See `moe.combine`; up to float32."""
    (num_tokens, top_k), hidden = ids.shape, y.shape[1]
    out = y.new_empty(num_tokens, hidden, dtype=dtype)
    width = triton.next_power_of_2(hidden)
    rows, x, gate = (y, y, None) if beside is None else (beside.rows, beside.x, beside.gate)
    assert rows.is_contiguous(), "rows without gaps"
    assert x.stride(1) == 1, "neighbouring columns"
    _combine[num_tokens,](
        y, ids, weights, places, rows, x, y if gate is None else gate.weight, out, x.stride(0),
        HIDDEN=hidden, TOP_K=top_k, N=width, PLACED=places is not None, BESIDE=beside is not None,
        GATED=gate is not None, num_warps=min(max(width // 256, 1), 16), **chained(y.device),
    )  # fmt: skip
    return out
