"""Normalisation. RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. T tokens, H heads, D head dim."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import rms_norm, silu

from tessera.ops.precision import wide


def rmsnorm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool = False) -> Tensor:
    """`x * rsqrt(mean(x^2) + eps) * w` over the last dim, in fp32 or wider, rounded once to x's dtype.

    `zero_centred`: the stored weight is an offset from one (Qwen3.5, Qwen3-Next).
    """
    if weight.dtype == x.dtype and not zero_centred:
        return rms_norm(x, x.shape[-1:], weight, eps)  # computes wide by itself
    dtype = wide(x.dtype)
    w = weight.to(dtype)
    return rms_norm(x.to(dtype), x.shape[-1:], 1 + w if zero_centred else w, eps).to(x.dtype)


def add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool = False
) -> tuple[Tensor, Tensor]:
    """(rmsnorm(x + residual), x + residual)."""
    total = x + residual
    return rmsnorm(total, weight, eps, zero_centred), total


def gated_rmsnorm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`w * rmsnorm(o) * silu(z)` per head, in fp32 or wider: o and z [T, H, D], weight [D], result in z's dtype."""
    dtype = wide(z.dtype)
    h = rms_norm(o.to(dtype), o.shape[-1:], weight.to(dtype), eps)
    return (h * silu(z.to(dtype))).to(z.dtype)
