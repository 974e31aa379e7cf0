"""Norms and gates as one Triton kernel each; `ops/norm.py` and `ops/fused.py` hold the plain twins. T rows, N columns.

All compute in fp32, whatever the tensors' dtype, and round once; columns are neighbours in memory, rows may have gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.linear import PackedLinear
from tessera.ops.triton_common import chained, follow

BLOCK = 1024  # columns of a program of the gates


@triton.jit
def _rmsnorm_kernel(
    x, added, weight, out, total, x_stride, added_stride, columns, eps,
    ADDS: tl.constexpr, ZERO_CENTRED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < columns
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    follow()
    v = tl.load(x + row * x_stride + at, inside, 0.0)
    if ADDS:
        v = (v.to(tl.float32) + tl.load(added + row * added_stride + at, inside, 0.0).to(tl.float32)).to(v.dtype)
        tl.store(total + row * columns + at, v, inside)
    wide = v.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / columns + eps)
    if ZERO_CENTRED:
        w += 1.0
    tl.store(out + row * columns + at, (wide * scale * w).to(out.dtype.element_ty), inside)


def rmsnorm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool = False) -> Tensor:
    """See `norm.rmsnorm`; x [T, N]."""
    out = x.new_empty(x.shape)
    _launch(x, x, weight, out, out, eps, False, zero_centred)
    return out


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """See `norm.add_rmsnorm`; x and residual [T, N]."""
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, residual, weight, out, total, eps, True, zero_centred)
    return out, total


def _launch(
    x: Tensor, added: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, adds: bool, zero_centred: bool
) -> None:
    rows, columns = x.shape
    width = triton.next_power_of_2(columns)
    if rows:
        _rmsnorm_kernel[(rows,)](
            x, added, weight, out, total, x.stride(0), added.stride(0), columns, eps,
            adds, zero_centred, width, num_warps=min(max(width // 512, 1), 16), **chained(x.device),
        )  # fmt: skip


@triton.jit
def _gate_kernel(x, gate, out, x_stride, gate_stride, columns, total, SILU: tl.constexpr, WIDTH: tl.constexpr):
    follow()
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < total
    row, column = at // columns, at % columns
    v = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, inside, 0.0).to(tl.float32)
    factor = 1.0 / (1.0 + tl.exp(-g))
    if SILU:
        factor *= g
    tl.store(out + at, (v * factor).to(out.dtype.element_ty), inside)


def silu_mul(y: Tensor) -> Tensor:
    """See `fused.silu_mul`."""
    gate, up = y.chunk(2, -1)
    return _gated(up, gate, silu=True)


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """See `fused.sigmoid_mul`."""
    return _gated(x, gate, silu=False)


def _gated(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, total = x.shape[1], out.numel()
    if total:
        grid = (triton.cdiv(total, BLOCK),)
        _gate_kernel[grid](x, gate, out, x.stride(0), gate.stride(0), columns, total, silu, BLOCK, **chained(x.device))
    return out


@triton.jit
def _add_gated_kernel(part, shared, x, gate, out, x_stride, columns, GATED: tl.constexpr, WIDTH: tl.constexpr):
    follow()
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = at < columns
    v = tl.load(shared + row * columns + at, inside, 0.0).to(tl.float32)
    if GATED:
        token = tl.load(x + row * x_stride + at, inside, 0.0).to(tl.float32)
        v *= 1.0 / (1.0 + tl.exp(-tl.sum(token * tl.load(gate + at, inside, 0.0).to(tl.float32))))
    v += tl.load(part + row * columns + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + at, v.to(out.dtype.element_ty), inside)


def add_gated(
    part: Tensor, shared: Tensor, x: Tensor, gate: PackedLinear | None, dtype: torch.dtype | None = None
) -> Tensor:
    """See `fused.add_gated`; part and shared without gaps."""
    out, (rows, columns) = torch.empty_like(part, dtype=dtype), part.shape
    assert part.is_contiguous(), "rows without gaps"
    assert shared.is_contiguous(), "rows without gaps"
    if rows:
        width = triton.next_power_of_2(columns)
        weight = part if gate is None else gate.weight
        _add_gated_kernel[(rows,)](
            part, shared, x, weight, out, x.stride(0), columns, gate is not None, width,
            num_warps=min(max(width // 512, 1), 16), **chained(x.device),
        )  # fmt: skip
    return out
