"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their scalings. T tokens, H heads, D head dim."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.core.config.needs import Sketch
from tessera.core.spec import DeltaSpec, RopeSpec
from tessera.core.tensors import DTYPE_BYTES, wide_dtype
from tessera.ops.precision import wide


def rope_bytes(sketch: Sketch) -> int:
    """Bytes of the tables of all ropes of a model."""
    ropes = {layer.mixer.rope for layer in sketch.spec.layers if not isinstance(layer.mixer, DeltaSpec)}
    return sum(sketch.context * rope.dim * DTYPE_BYTES[wide_dtype(sketch.dtype)] for rope in ropes)


@dataclass(frozen=True, slots=True)
class RopeTables:
    """cos and sin [max_positions, dim / 2], float32 or wider, already times the scaling's attention factor."""

    cos: Tensor
    sin: Tensor

    @property
    def dim(self) -> int:
        """How many dims of a head are rotated."""
        return 2 * self.cos.shape[1]


def rope_tables(
    rope: RopeSpec, max_positions: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RopeTables:
    """Tables for positions 0 .. max_positions - 1, computed in `dtype` (made float32 where it is narrower)."""
    dtype = wide(dtype)
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=dtype) / rope.dim)
    angles = torch.arange(max_positions, dtype=dtype)[:, None] * _FREQUENCIES[rope.kind](plain, rope)
    return RopeTables((angles.cos() * rope.table_scale).to(device), (angles.sin() * rope.table_scale).to(device))


def _default(plain: Tensor, rope: RopeSpec) -> Tensor:
    return plain


def _linear(plain: Tensor, rope: RopeSpec) -> Tensor:
    return plain / rope.factor


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are divided by the factor, those between are blended."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_positions * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(plain: Tensor, rope: RopeSpec) -> Tensor:
    """YaRN: dims that turn often are kept, those that turn seldom are divided by the factor, a ramp between."""

    def dim_of(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(len(plain), dtype=plain.dtype) - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first `dim` dims of x [T, H, D] by the tables' rows of their positions, cos and sin [T, 1, dim / 2];
    the others pass. In fp32 or wider, rounded once.

    Pairs are (i, i + dim / 2), or neighbours (2i, 2i + 1) when `interleaved`; each element stays in its place.
    """
    dim = 2 * cos.shape[-1]
    turned = x[..., :dim].to(wide(x.dtype))
    if interleaved:
        a, b = turned.unflatten(-1, (dim // 2, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    if dim == x.shape[-1]:
        return turned.to(x.dtype)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), -1)
