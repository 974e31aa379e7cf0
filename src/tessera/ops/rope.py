"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their scalings. T tokens, H heads, D head dim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.core.config.needs import Sketch
from tessera.core.errors import ModelError
from tessera.core.spec import DeltaSpec
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
    dim: int,
    max_positions: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RopeTables:
    """Tables for positions 0 .. max_positions - 1, computed in `dtype` (made float32 where it is narrower).

    `scaling` is `rope_parameters` (or the older `rope_scaling`) of a config.json: type default, linear, llama3 or yarn.
    """
    dtype = wide(dtype)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _FREQUENCIES:
        raise ModelError(f"rope type '{kind}' is not one of {', '.join(_FREQUENCIES)}; this model cannot be served")
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)
    frequencies = _FREQUENCIES[kind](plain, theta, scaling)
    angles = torch.arange(max_positions, dtype=dtype)[:, None] * frequencies
    factor = attention_factor(scaling) if kind == "yarn" else 1.0
    return RopeTables((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """`0.1 * mscale * ln(factor) + 1`, and 1 where nothing is stretched (YaRN, arXiv 2309.00071, and DeepSeek-V2)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What yarn multiplies cos and sin by: DeepSeek's ratio of both mscales where both are given."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def _default(plain: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    return plain


def _linear(plain: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    return plain / scaling["factor"]


def _llama3(plain: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are divided by the factor, those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / scaling["factor"] + keep * plain


def _yarn(plain: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """YaRN: dims that turn often are kept, those that turn seldom are divided by the factor, a ramp between."""
    dim = 2 * len(plain)
    context = scaling["original_max_position_embeddings"]

    def dim_of(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(len(plain), dtype=plain.dtype) - low) / width).clamp(0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


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
