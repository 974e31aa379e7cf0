"""Scores of a router in fp32 from bfloat16 tokens, for many of them. T tokens, E experts, H hidden, P parts of it;
N experts, M tokens and K of the hidden numbers a tile.

An fp32 number is the sum of three bfloat16 ones, of 8 bits each. Their products with bfloat16 tokens are exact in fp32
and are summed there, as an fp32 product sums them, but by the tensor cores, and no token is widened in memory. Tensor
cores cut a sum off instead of rounding it (Hopper: 2e-5 over 2,048 numbers), so they sum short stretches, the small
terms first, and these are added up outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.triton_common import chained, dot, follow, num_processors

PARTS = 8  # of a sum, each by a program of its own, where tokens alone do not fill the device


@dataclass(frozen=True, slots=True)
class ScoreTile:
    """How the product is cut, for up to `tokens` tokens."""

    tokens: float
    n: int
    m: int
    k: int
    warps: int
    stages: int


TILES = (
    ScoreTile(256, 64, 16, 64, 4, 4),
    ScoreTile(1024, 64, 32, 64, 4, 4),
    ScoreTile(float("inf"), 64, 64, 64, 4, 4),
)


def tile_of(num_tokens: int) -> ScoreTile:
    """The tile for so many tokens."""
    return next(tile for tile in TILES if num_tokens <= tile.tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _scores(
    x_ptr, w_ptr, out_ptr, num_tokens, x_row, depth, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [P, T, E]: x w.T over `depth` of the hidden numbers each. Tensor cores take left factors from registers: the
    weights are these."""
    follow()
    expert, token = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * M + tl.arange(0, M)
    inner, known, there = tl.arange(0, K), expert < EXPERTS, token < num_tokens
    first = tl.program_id(2) * depth
    w_at = w_ptr + expert[:, None] * HIDDEN + inner[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * x_row + inner[:, None]
    scores = tl.zeros([N, M], tl.float32)
    for k in tl.range(first, tl.minimum(first + depth, HIDDEN), K, num_stages=STAGES):
        inside = k + inner < HIDDEN
        w = tl.load(w_at + k, mask=known[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_at + k, mask=there[None, :] & inside[:, None], other=0.0)
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        scores += dot(high, x, dot(middle, x, dot(low, x, None)))
    out_at = out_ptr + (tl.program_id(2).to(tl.int64) * num_tokens + token)[None, :] * EXPERTS + expert[:, None]
    tl.store(out_at, scores, mask=known[:, None] & there[None, :])


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `scores` takes them."""
    return len(x) > 0 and x.dtype == torch.bfloat16 and weight.dtype == torch.float32 and not weight.is_mkldnn


def scores(x: Tensor, weight: Tensor, tile: ScoreTile | None = None) -> Tensor:
    """Parts [P, T, E] in fp32 whose sum is `x.float() @ weight.T`: x [T, H] in bfloat16, weight [E, H] without gaps."""
    assert weight.is_contiguous(), "whole weights"
    (num_tokens, hidden), num_experts = x.shape, len(weight)
    x, tile = x if x.stride(1) == 1 else x.contiguous(), tile or tile_of(num_tokens)
    grid = triton.cdiv(num_experts, tile.n), triton.cdiv(num_tokens, tile.m)
    parts = PARTS if grid[0] * grid[1] < num_processors(x.device) else 1
    out = torch.empty(parts, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    _scores[*grid, parts](
        x, weight, out, num_tokens, x.stride(0), triton.cdiv(hidden, tile.k * parts) * tile.k,
        EXPERTS=num_experts, HIDDEN=hidden, N=tile.n, M=tile.m, K=tile.k, STAGES=tile.stages, num_warps=tile.warps,
        **chained(x.device),
    )  # fmt: skip
    return out
