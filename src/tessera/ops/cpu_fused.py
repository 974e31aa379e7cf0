"""Groups of small operations on a CPU: few passes, in place, over blocks of rows that stay in cache.

What a step of many tokens costs otherwise is less arithmetic than fresh pages for every temporary. Signatures and
meaning are those of the plain twins (`norm.py`, `fused.py`), which also serve other devices. The result of a group is
rounded once. T tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from tessera.ops import fused, norm
from tessera.ops.attention import write_kv
from tessera.ops.fused import HeadInputs, rotation
from tessera.ops.linear import PackedLinear, linear
from tessera.ops.precision import wide
from tessera.ops.segments import Segments

BLOCK = 1 << 18  # elements that are worked on at a time: 1 MB in fp32
FEW = 1 << 16  # elements of which torch's own composite norm costs less than the calls here


def rmsnorm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool = False) -> Tensor:
    """See `norm.rmsnorm`."""
    if x.device.type != "cpu" or x.dtype == wide(x.dtype) or x.numel() < FEW:
        return norm.rmsnorm(x, weight, eps, zero_centred)
    return _normed(x.to(wide(x.dtype)), _scale(weight, x.dtype, zero_centred), eps).to(x.dtype)


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """See `norm.add_rmsnorm`."""
    total = x + residual
    return rmsnorm(total, weight, eps, zero_centred), total


def silu_mul(y: Tensor) -> Tensor:
    """See `fused.silu_mul`."""
    gate, up = y.chunk(2, -1)
    return silu(gate).mul_(up)


def gated_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """See `fused.gated_product`."""
    return silu_mul(linear(x, packed))


def write_heads(y: Tensor, inputs: HeadInputs, pool: Tensor, segments: Segments) -> Tensor:
    """See `fused.write_heads`."""
    if y.device.type != "cpu":
        return fused.write_heads(y, inputs, pool, segments)
    cos, sin = rotation(inputs.tables, segments)
    out = y.new_empty(len(y), inputs.num_q + inputs.num_k, inputs.dim)
    for columns, heads, weight in _parts(inputs):
        size = max(1, BLOCK // (columns.stop - columns.start))
        source, target = y[:, columns].unflatten(1, (-1, inputs.dim)), out[:, heads]
        for at in range(0, len(y), size):
            rows = slice(at, at + size)
            block = source[rows].to(cos.dtype, copy=True)
            if weight is not None:
                _normed(block, weight, inputs.eps)
            _rotate(block, cos[rows], sin[rows], inputs.interleaved)
            target[rows] = block
    write_kv(pool, out[:, inputs.num_q :], y[:, inputs.v].unflatten(1, (-1, inputs.dim)), segments)
    return out[:, : inputs.num_q]


def _parts(inputs: HeadInputs) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(columns of y, heads of the output, weight [H, D] of their norms): q and k as one where they are neighbours."""
    num_q, scales = inputs.num_q, inputs.scales
    if inputs.q.stop == inputs.k.start:
        yield slice(inputs.q.start, inputs.k.stop), slice(None), scales
        return
    yield inputs.q, slice(num_q), None if scales is None else scales[:num_q]
    yield inputs.k, slice(num_q, None), None if scales is None else scales[num_q:]


def _scale(weight: Tensor, dtype: torch.dtype, zero_centred: bool) -> Tensor:
    weight = weight.to(wide(dtype))
    return 1 + weight if zero_centred else weight


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], which is overwritten, times `rsqrt(mean(x^2) + eps) * weight`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Rotates the first dims of x [T, H, D] in place: see `rope.rotate`."""
    half = cos.shape[-1]
    turned = x[..., : 2 * half]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    first = (a * cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(first)
