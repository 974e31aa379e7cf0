"""Products of fp8 weights in blocks with activations quantised in groups of a row: the plain twins of `triton_fp8.py`.

As DeepSeek-V3 does it (arXiv 2412.19437, 3.3). T tokens, K inputs, N outputs, E experts, H hidden, I intermediate. A
weight [..., N, K] has one fp32 scale for each block: [..., N / bn, K / bk], rounded up; an activation one for each 128
neighbours of a row: [T, K / 128].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tessera.ops.precision import wide

GROUP = 128
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 1e-10  # amax of a group of zeros


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> (float8_e4m3fn [T, K], scales fp32 [T, K / 128]): a group's largest magnitude becomes 448."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scales = padded.abs().amax(-1).clamp(min=SMALLEST) / LARGEST
    values = (padded / scales[..., None]).clamp(-LARGEST, LARGEST).flatten(-2)[..., : x.shape[-1]]
    return values.to(torch.float8_e4m3fn), scales


def dequantize(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """values [..., N, K], scales [..., N / bn, K / bk] -> fp32 [..., N, K]."""
    spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return values.float() * spread[..., : values.shape[-2], : values.shape[-1]]


def requantized(x: Tensor) -> Tensor:
    """x [T, K] as a product sees it: quantised, in fp32."""
    return dequantize(*quantize(x), (1, GROUP))


def linear_reference(x: Tensor, weight: Tensor, scales: Tensor, block: tuple[int, int] = (GROUP, GROUP)) -> Tensor:
    """x [T, K] times weight [N, K] in fp8 -> [T, N] in x's dtype; sums in fp32."""
    return linear(requantized(x), dequantize(weight, scales, block)).to(x.dtype)


def experts_reference(
    x: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    ids: Tensor,
    weights: Tensor,
    block: tuple[int, int] = (GROUP, GROUP),
) -> Tensor:
    """`moe.experts_reference` with fp8 weights w13 [E, 2I, H], w2 [E, H, I]; what lies between the two products is
    rounded to x's dtype, then quantised."""
    out = torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
    x_seen = requantized(x)
    for e in range(len(w13)):
        tokens, nth = (ids == e).nonzero(as_tuple=True)
        gate, up = linear(x_seen[tokens], dequantize(w13[e], s13[e], block)).chunk(2, -1)
        h = requantized((silu(gate) * up).to(x.dtype))
        y = linear(h, dequantize(w2[e], s2[e], block)).to(x.dtype)
        out.index_add_(0, tokens, y.to(out.dtype) * weights[tokens, nth, None].to(out.dtype))
    return out.to(x.dtype)
