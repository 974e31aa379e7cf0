"""Choosing experts in one launch. T tokens, E experts in G groups of S, k experts a token."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scores(logits, valid, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        grown = tl.where(valid, tl.exp(logits - tl.max(logits)), 0.0)
        return grown / tl.sum(grown)
    return tl.where(valid, 1 / (1 + tl.exp(-logits)), 0.0)


@triton.jit
def _open_groups(choice, expert, TOP: tl.constexpr, TOP2: tl.constexpr, NUM: tl.constexpr, PADDED: tl.constexpr):
    """[PADDED, 1]: the TOP groups of the best score; of two that score alike, the first."""
    group = tl.arange(0, PADDED)
    score = tl.max(choice, 1)
    if TOP2:
        first = tl.min(tl.where(choice == score[:, None], expert, 1 << 30), 1)
        score += tl.max(tl.where(expert == first[:, None], float("-inf"), choice), 1)
    score = tl.where(group < NUM, score, float("-inf"))
    opened = group < 0
    for _ in tl.static_range(TOP):
        best = tl.min(tl.where(score == tl.max(score, 0), group, PADDED), 0)
        opened = opened | (group == best)
        score = tl.where(group == best, float("-inf"), score)
    return opened[:, None]


@triton.jit
def _route(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride, scale,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, GROUPS_PADDED)[:, None], tl.arange(0, SIZE_PADDED)[None, :]
    expert, valid = group * SIZE + place, (group < NUM_GROUPS) & (place < SIZE)
    logits = tl.load(logits_ptr + token * stride + expert, mask=valid, other=float("-inf")).to(tl.float32)
    scores = _scores(logits, valid, SOFTMAX)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
    choice = tl.where(valid, choice, float("-inf"))
    if TOP_GROUPS < NUM_GROUPS:
        opened = _open_groups(choice, expert, TOP_GROUPS, TOP2, NUM_GROUPS, GROUPS_PADDED)
        choice = tl.where(opened, choice, float("-inf"))
    nth = tl.arange(0, K_PADDED)
    ids, weights = tl.zeros([K_PADDED], tl.int64), tl.zeros([K_PADDED], tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.min(tl.where(choice == tl.max(choice), expert, NUM_GROUPS * SIZE - 1))  # NaN: some expert there is
        weights = tl.where(nth == j, tl.sum(tl.where(expert == best, scores, 0.0)), weights)
        ids = tl.where(nth == j, best.to(tl.int64), ids)
        choice = tl.where(expert == best, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    at = token * TOP_K + nth
    tl.store(ids_ptr + at, ids, mask=nth < TOP_K)
    tl.store(weights_ptr + at, weights * scale, mask=nth < TOP_K)


def route(
    logits: Tensor,
    top_k: int,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """See `moe.route`; up to float32. Experts that score alike are chosen in the order of their numbers."""
    num_tokens, num_experts = logits.shape
    assert logits.dtype != torch.float64, "up to float32"
    assert logits.stride(1) == 1, "neighbouring columns"
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    size = num_experts // num_groups
    if num_tokens:
        _route[num_tokens,](
            logits, bias, ids, weights, logits.stride(0), scale,
            TOP_K=top_k, NUM_GROUPS=num_groups, SIZE=size, TOP_GROUPS=top_groups, SOFTMAX=scoring == "softmax",
            BIASED=bias is not None, TOP2=group_score == "top2", NORMALIZE=normalize,
            GROUPS_PADDED=triton.next_power_of_2(num_groups), SIZE_PADDED=triton.next_power_of_2(size),
            K_PADDED=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
    return ids, weights
