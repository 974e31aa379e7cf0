"""Products of fp8 weights in blocks with activations quantised in groups of a row: the plain twins of `triton_fp8.py`.

As DeepSeek-V3 does it (arXiv 2412.19437, 3.3). T tokens, K inputs, N outputs, E experts, H hidden, I intermediate. A
weight [..., N, K] has one fp32 scale for each block: [..., N / bn, K / bk], rounded up; an activation one for each bk
neighbours of a row: [T, K / bk].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from tessera.ops.linear import AfterGate, PackedLinear
from tessera.ops.precision import kept_in, wide

GROUP = 128
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 1e-10  # amax of a group of zeros

Block = tuple[int, int]
Product = Callable[..., Tensor]  # x, values, scales, block; see `linear_reference`


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A weight [..., N, K] as `values` in float8_e4m3fn, with fp32 `scales` of blocks of `block` rows and columns."""

    values: Tensor
    scales: Tensor
    block: Block

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.values.device

    def plain(self, expert: int, dtype: torch.dtype) -> Tensor:
        """One of several matrices, in `dtype` (fp32 or wider)."""
        return dequantize(self.values[expert], self.scales[expert], self.block, dtype)


def quantize(x: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """x [T, K] -> (float8_e4m3fn [T, K], scales [T, K / group]): a group's largest magnitude becomes 448.

    Scales are fp32 or wider.
    """
    padded = pad(x.to(wide(x.dtype)), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scales = _scales(padded.abs().amax(-1))
    values = (padded * (1 / scales)[..., None]).clamp(-LARGEST, LARGEST).flatten(-2)[..., : x.shape[-1]]
    return values.to(torch.float8_e4m3fn), scales


def _scales(largest: Tensor) -> Tensor:
    """Scales by largest magnitudes, with the same bits everywhere: what is divided by a number, and not by a tensor,
    PyTorch multiplies on CUDA with the number's rounded inverse."""
    return largest.clamp(min=SMALLEST) / largest.new_full((), LARGEST)


def quantize_weight(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Weight [N, K] in fp32 -> (float8_e4m3fn [N, K], scales fp32 [N / bn, K / bk]), as `quantize` does by groups."""
    (rows, columns), (height, width) = weight.shape, block
    padded = pad(weight, (0, -columns % width, 0, -rows % height))
    boxes = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [N / bn, bn, K / bk, bk]
    scales = _scales(boxes.abs().amax((1, 3)))
    values = (boxes / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).flatten(2).flatten(0, 1)
    return values[:rows, :columns].to(torch.float8_e4m3fn), scales


def dequantize(values: Tensor, scales: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """values [..., N, K], scales [..., N / bn, K / bk] -> `dtype` (fp32 or wider) [..., N, K]."""
    spread = scales.to(dtype).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return values.to(dtype) * spread[..., : values.shape[-2], : values.shape[-1]]


def requantized(x: Tensor, group: int = GROUP) -> Tensor:
    """x [T, K] as a product sees it: quantised, in fp32 or wider."""
    return dequantize(*quantize(x, group), (1, group), wide(x.dtype))


def linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, block: Block = (GROUP, GROUP), unrounded: bool = False
) -> Tensor:
    """x [T, K] times weight [N, K] in fp8 -> [T, N] in x's dtype; sums in fp32 or wider, as the result is where it is
    `unrounded`."""
    y = linear(requantized(x, block[1]), dequantize(weight, scales, block, wide(x.dtype)))
    return y if unrounded else y.to(x.dtype)


def experts_reference(
    x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor, unrounded: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`moe.experts_reference` with fp8 weights w13 [E, 2I, H], w2 [E, H, I]; what lies between the two products is
    rounded to x's dtype, then quantised."""
    precise = wide(x.dtype)
    out = torch.zeros(x.shape, dtype=precise, device=x.device)
    x_seen = requantized(x, w13.block[1])
    for e in ids.unique().tolist():
        if e < 0:
            continue
        tokens, nth = (ids == e).nonzero(as_tuple=True)
        gate, up = linear(x_seen[tokens], w13.plain(e, precise)).chunk(2, -1)
        h = requantized((silu(gate) * up).to(x.dtype), w2.block[1])
        y = linear(h, w2.plain(e, precise)).to(precise if unrounded else x.dtype)
        out.index_add_(0, tokens, y.to(out.dtype) * weights[tokens, nth, None].to(out.dtype))
    return out.to(kept_in(x.dtype, unrounded, dtype))


def pack(
    weight: Fp8Weight, product: Product = linear_reference, gated: Product | None = None,
    after_gate: Callable[[Fp8Weight], AfterGate] | None = None,
) -> PackedLinear:  # fmt: skip
    """Prepares a weight [N, K] for `linear.linear`, with `product` as its version of `linear_reference`.

    `gated`: one that ends in silu(gate) * up; `after_gate` gives one that begins with it.
    """
    values, scales, block = weight.values, weight.scales, weight.block

    def multiply(x: Tensor, values: Tensor, bias: Tensor | None, unrounded: bool = False) -> Tensor:
        assert bias is None, "no model here has fp8 weights with a bias"
        return product(x, values, scales, block, unrounded=unrounded)

    once = None if gated is None else partial(gated, weight=values, scales=scales, block=block)
    after = None if after_gate is None else after_gate(weight)
    return PackedLinear(values, None, multiply, once, None, after, partial(multiply, unrounded=True))
