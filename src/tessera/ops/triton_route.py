"""Choosing experts in one launch, for few tokens with their scores. T tokens, E experts in G groups of S, k experts
a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops import triton_scores
from tessera.ops.linear import linear
from tessera.ops.moe import Router, Rules
from tessera.ops.precision import wide
from tessera.ops.triton_common import chained, follow, num_processors
from tessera.ops.triton_linear import Tile, add_products, weights_at

TOKENS = 8  # whose product and choice are one launch: each token reads the whole weight anew, out of the cache
SCORING = Tile(2048, 2048, 1)


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
def _ordered(x):
    """float32 as int32 of the same order, which a warp compares in one instruction; its own inverse on the bits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0: of -0.0 as well
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _choose(
    logits, expert, valid, bias_ptr, ids_ptr, weights_ptr, scale,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """Writes the experts of one token, and their weights: logits [GROUPS_PADDED, SIZE_PADDED] in fp32."""
    scores = _scores(logits, valid, SOFTMAX)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
    choice = tl.where(valid, choice, float("-inf"))
    if TOP_GROUPS < NUM_GROUPS:
        opened = _open_groups(choice, expert, TOP_GROUPS, TOP2, NUM_GROUPS, GROUPS_PADDED)
        choice = tl.where(opened, choice, float("-inf"))
    never: tl.constexpr = -(1 << 31)
    order = tl.where(valid, _ordered(choice), never)
    nth = tl.arange(0, K_PADDED)
    ids, weights = tl.zeros([K_PADDED], tl.int64), tl.zeros([K_PADDED], tl.float32)
    for j in tl.static_range(TOP_K):
        top = tl.max(order)
        best = tl.min(tl.where(order == top, expert, NUM_GROUPS * SIZE - 1))
        if BIASED:
            weight = tl.sum(tl.where(expert == best, scores, 0.0))
        else:
            weight = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        weights = tl.where(nth == j, weight, weights)
        ids = tl.where(nth == j, best.to(tl.int64), ids)
        order = tl.where(expert == best, never, order)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(ids_ptr + nth, ids, mask=nth < TOP_K)
    tl.store(weights_ptr + nth, weights * scale, mask=nth < TOP_K)


@triton.jit
def _numbers(NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUPS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """[GROUPS_PADDED, SIZE_PADDED]: experts by group, and which of them there are."""
    group, place = tl.arange(0, GROUPS_PADDED)[:, None], tl.arange(0, SIZE_PADDED)[None, :]
    return group * SIZE + place, (group < NUM_GROUPS) & (place < SIZE)


@triton.jit
def _route(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride, part, scale, PARTS: tl.constexpr,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """Program: a token, whose logits are the sum of PARTS."""
    follow()
    token = tl.program_id(0).to(tl.int64)
    expert, valid = _numbers(NUM_GROUPS, SIZE, GROUPS_PADDED, SIZE_PADDED)
    at = logits_ptr + token * stride + expert
    logits = tl.load(at, mask=valid, other=float("-inf")).to(tl.float32)
    for p in tl.static_range(1, PARTS):
        logits += tl.load(at + part.to(tl.int64) * p, mask=valid, other=0.0)
    _choose(
        logits, expert, valid, bias_ptr, ids_ptr + token * TOP_K, weights_ptr + token * TOP_K, scale,
        TOP_K, NUM_GROUPS, SIZE, TOP_GROUPS, SOFTMAX, BIASED, TOP2, NORMALIZE, GROUPS_PADDED, K_PADDED,
    )  # fmt: skip


@triton.jit
def _score_and_route(
    x, w, logits_ptr, arrived, bias_ptr, ids_ptr, weights_ptr, x_row, scale,
    DEPTH: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SOFTMAX: tl.constexpr, BIASED: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """Program (experts, token): N logits. The last one of a token to arrive sees all of its logits, and chooses."""
    num: tl.constexpr = NUM_GROUPS * SIZE
    column, inner, token = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K), tl.program_id(1)
    last: tl.constexpr = (DEPTH - 1) // K * K
    weights = weights_at(w, column, 0, inner, num, DEPTH)
    follow()
    acc, x = tl.zeros([N, 1], tl.float32), x + token.to(tl.int64) * x_row
    for k in range(0, last, K):
        following = weights_at(w, column, k + K, inner, num, DEPTH)
        acc = add_products(acc, weights, x, 0, k, inner, DEPTH, 1, 1)
        weights = following
    acc = add_products(acc, weights, x, 0, last, inner, DEPTH, 1, 1)
    if not WIDE:
        acc = acc.to(w.dtype.element_ty).to(tl.float32)
    tl.store(logits_ptr + token * num + column[:, None], acc, mask=(column < num)[:, None])
    tl.debug_barrier()  # all threads have written before one of them says so
    if tl.atomic_add(arrived + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived + token, 0)  # for the next launch
        tl.debug_barrier()
        expert, valid = _numbers(NUM_GROUPS, SIZE, GROUPS_PADDED, SIZE_PADDED)
        at = logits_ptr + token * num + expert
        logits = tl.load(at, mask=valid, other=float("-inf"), cache_modifier=".cg")  # others wrote: from the L2 cache
        _choose(
            logits, expert, valid, bias_ptr, ids_ptr + token * TOP_K, weights_ptr + token * TOP_K, scale,
            TOP_K, NUM_GROUPS, SIZE, TOP_GROUPS, SOFTMAX, BIASED, TOP2, NORMALIZE, GROUPS_PADDED, K_PADDED,
        )  # fmt: skip


def route(logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """See `moe.route`; up to float32."""
    return _routed(logits[None], rules)


def _routed(parts: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """`route` of the sum of parts [P, T, E]; of more than one: in fp32."""
    num_parts, num_tokens, num_experts = parts.shape
    assert parts.dtype != torch.float64, "up to float32"
    assert parts.stride(2) == 1, "neighbouring columns"
    ids, weights = _results(parts[0], rules.top_k)
    if num_tokens:
        _route[num_tokens,](
            parts, rules.bias, ids, weights, parts.stride(1), parts.stride(0), rules.scale, PARTS=num_parts,
            **_sizes(num_experts, rules), num_warps=1, **chained(parts.device),
        )  # fmt: skip
    return ids, weights


def _results(like: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Where experts and weights of as many tokens go."""
    ids = torch.empty(len(like), top_k, dtype=torch.int64, device=like.device)
    return ids, torch.empty(len(like), top_k, dtype=torch.float32, device=like.device)


def _sizes(num_experts: int, rules: Rules) -> dict[str, object]:
    """The rules as a kernel takes them."""
    size = num_experts // rules.num_groups
    return {
        "TOP_K": rules.top_k, "NUM_GROUPS": rules.num_groups, "SIZE": size, "TOP_GROUPS": rules.top_groups,
        "SOFTMAX": rules.scoring == "softmax", "BIASED": rules.bias is not None, "TOP2": rules.group_score == "top2",
        "NORMALIZE": rules.normalize, "GROUPS_PADDED": triton.next_power_of_2(rules.num_groups),
        "SIZE_PADDED": triton.next_power_of_2(size), "K_PADDED": triton.next_power_of_2(rules.top_k),
    }  # fmt: skip


def choose(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """See `moe.choose`. Few tokens take one launch, in which each program counts itself in `router.arrived`."""
    weight, most = router.weight.weight, min(TOKENS, len(router.arrived))
    if not 0 < len(x) <= most or x.dtype == torch.float64 or router.weight.bias is not None or weight.is_mkldnn:
        return choose_apart(x, router)
    return score_and_route(x, router)


def choose_apart(x: Tensor, router: Router, tile: triton_scores.ScoreTile | None = None) -> tuple[Tensor, Tensor]:
    """`choose` as a product and a choice, for any number of tokens."""
    weight = router.weight.weight
    if router.wide and router.weight.bias is None and triton_scores.fits(x, weight):
        return _routed(triton_scores.scores(x, weight, tile), router.rules)
    return route(linear(x.to(wide(x.dtype)) if router.wide else x, router.weight), router.rules)


def score_and_route(x: Tensor, router: Router, tile: Tile = SCORING) -> tuple[Tensor, Tensor]:
    """`choose` in one launch, for up to as many tokens as `router.arrived` counts; weights without gaps, no bias."""
    weight, rules = router.weight.weight, router.rules
    num_experts, depth = weight.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    logits = torch.empty(len(x), num_experts, dtype=torch.float32, device=x.device)
    ids, weights = _results(x, rules.top_k)
    n, k = tile.of(num_experts, depth, num_processors(x.device))
    _score_and_route[triton.cdiv(num_experts, n), len(x)](
        x, weight, logits, router.arrived, rules.bias, ids, weights, x.stride(0), rules.scale,
        DEPTH=depth, N=n, K=k, WIDE=router.wide, **_sizes(num_experts, rules), num_warps=tile.warps,
        **chained(x.device),
    )  # fmt: skip
    return ids, weights
