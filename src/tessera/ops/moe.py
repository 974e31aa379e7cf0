"""Mixture of experts: routing, and the experts' MLPs.

T tokens, H hidden, E experts, I intermediate, k experts a token, n tokens of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tessera.ops import linear as packed
from tessera.ops.fused import Shared, add_gated, gated_mlp
from tessera.ops.linear import SWAPPED_UP_TO, as_columns, swaps_pay, turned, widened
from tessera.ops.precision import kept_in, wide

Mixture = Callable[..., Tensor]
Made = Callable[[], Tensor]
Dtype = torch.dtype | None


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """How scores choose `top_k` experts.

    Scores are softmax or sigmoid of the logits in fp32. The choice is by score + `bias` [E] (DeepSeek-V3's correction),
    the weights are scores without it, divided by their sum when `normalize`, times `scale`. With `num_groups` > 1 only
    experts of the best `top_groups` groups stand for choice; a group's score is its largest (V2's group_limited_greedy)
    or the sum of its two largest (V3's noaux_tc). Of equal scores the lowest number is chosen: in bfloat16 many are
    equal, and which one is taken must not depend on the device.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    bias: Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    normalize: bool = True
    scale: float = 1.0


def route(logits: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Chooses experts: logits [T, E] -> ids int64 [T, k], weights [T, k] in fp32 or wider."""
    logits = logits.to(wide(logits.dtype))
    scores = logits.softmax(-1) if rules.scoring == "softmax" else logits.sigmoid()
    choice = scores if rules.bias is None else scores + rules.bias.to(scores.dtype)
    if rules.top_groups < rules.num_groups:
        grouped = choice.unflatten(-1, (rules.num_groups, -1))
        of_group = grouped.amax(-1) if rules.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        best = _first(of_group, rules.top_groups)
        shut = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        choice = grouped.masked_fill(shut[..., None], float("-inf")).flatten(-2)
    ids = _first(choice, rules.top_k)
    weights = scores.gather(-1, ids)
    if rules.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * rules.scale


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """How a layer's tokens choose experts: the product that scores them, in fp32 or wider where `wide`; the `rules`;
    `arrived` int32 [tokens], zeros between calls: what a kernel counts its programs with."""

    weight: packed.PackedLinear
    wide: bool
    rules: Rules
    arrived: Tensor


def choose(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Chooses the experts of x [T, H]: see `route`."""
    return route(packed.linear(x.to(wide(x.dtype)) if router.wide else x, router.weight), router.rules)


def _first(scores: Tensor, count: int) -> Tensor:
    """The `count` best of the last dim, in order."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def experts_reference(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, unrounded: bool = False, dtype: Dtype = None
) -> Tensor:
    """Sum over a token's experts of `weight * w2(silu(w1 x) * w3 x)`: x [T, H], w13 [E, 2I, H], w2 [E, H, I] -> [T, H].

    `ids` [T, k] number the experts held here; -1 means an expert held elsewhere, which adds nothing. The sum over
    experts is taken in fp32 or wider. `unrounded`: what an expert makes is not rounded to x's dtype, for ranks that
    hold parts of experts round parts of what one rank rounds. `dtype`: of the sum; None: as wide as what it adds.
    """
    out = torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
    for e in range(len(w13)):
        tokens, nth = (ids == e).nonzero(as_tuple=True)
        gate, up = linear(x[tokens], w13[e]).chunk(2, -1)
        y = (widened if unrounded else linear)(silu(gate) * up, w2[e])
        out.index_add_(0, tokens, y.to(out.dtype) * weights[tokens, nth, None].to(out.dtype))
    return out.to(kept_in(x.dtype, unrounded, dtype))


def experts(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, unrounded: bool = False, dtype: Dtype = None
) -> Tensor:
    """See `experts_reference`. Tokens are sorted by expert once; only experts that some token chose are visited."""
    out = torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)
    chosen, order = ids.flatten().sort(stable=True)
    tokens, weights = order // ids.shape[1], weights.flatten()[order][:, None].to(out.dtype)
    touched, counts = (column.tolist() for column in chosen.unique_consecutive(return_counts=True))
    swaps = len(w13) > 0 and swaps_pay(w13[0])
    for e, own, w in zip(touched, tokens.split(counts), weights.split(counts), strict=True):
        if e >= 0:
            mlp = _mlp_swapped if swaps and len(own) <= SWAPPED_UP_TO else _mlp
            out.index_add_(0, own, mlp(x[own], w13[e], w2[e], unrounded) * w)
    return out.to(kept_in(x.dtype, unrounded, dtype))


def _mlp(x: Tensor, w13: Tensor, w2: Tensor, unrounded: bool) -> Tensor:
    gate, up = linear(x, w13).chunk(2, -1)
    return (widened if unrounded else linear)(silu(gate) * up, w2)


def _mlp_swapped(x: Tensor, w13: Tensor, w2: Tensor, unrounded: bool) -> Tensor:
    """The same with the weights as left factors (see `linear.swapped`), turned once: at the end, or where the second
    product has another form."""
    gate, up = (w13 @ as_columns(x)).chunk(2, 0)
    h = silu(gate) * up
    y = h if unrounded else w2 @ h
    y = turned(y[:, :1] if len(x) == 1 else y)
    return widened(y, w2) if unrounded else y


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a mixture is not rounded to the tokens' dtype before it is added: what each expert makes (`rows`), what
    the shared one makes (`beside`). `total`: dtype of the sum; None: as wide as what each expert makes."""

    rows: bool = False
    beside: bool = False
    total: Dtype = None


ROUNDED = Kept()


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """What is added to a token's sum: its row [T, H], times sigmoid(gate(x)) where there is a gate, x [T, H]."""

    rows: Tensor
    x: Tensor
    gate: packed.PackedLinear | None


def combine(
    y: Tensor, ids: Tensor, weights: Tensor, places: Tensor | None = None, beside: Beside | None = None,
    dtype: Dtype = None,
) -> Tensor:  # fmt: skip
    """[T, H]: the rows y [T * k, H] of a token times their weights [T, k], added up; those of id -1 are not read.

    `places` [T * k]: which row of y is each routed one; None: they are in order. All is rounded once, to
    `dtype` (y's).
    """
    rows = (y if places is None else y[places]).view(*ids.shape, -1)
    rows = torch.where((ids >= 0)[..., None], rows.to(wide(y.dtype)), 0)  # a row that nobody wrote may be NaN
    out = (rows * weights[..., None].to(rows.dtype)).sum(1)
    if beside is not None:
        out = add_gated(out, beside.rows.to(out.dtype), beside.x, beside.gate)
    return out.to(dtype or y.dtype)


def mixture_of(
    experts: Callable[..., Tensor], gated_product: Callable[..., Tensor], add_gated: Callable[..., Tensor]
) -> Mixture:
    """Routed experts and the shared one, from versions of what they consist of."""

    def mixture(
        x: Tensor,
        w13: Tensor,
        w2: Tensor,
        ids: Tensor,
        weights: Tensor,
        shared: Shared | None,
        made: Made | None = None,
        kept: Kept = ROUNDED,
    ) -> Tensor:
        """What `experts_reference` gives, with what the shared expert makes of x, where there is one.

        `made` gives what it makes, where that is under way already: asked for once all else is.
        """
        if shared is None:
            return experts(x, w13, w2, ids, weights, kept.rows, kept.total)
        part = experts(x, w13, w2, ids, weights, kept.rows, kept_in(x.dtype, kept.rows or kept.beside))
        rows = gated_mlp(x, shared.w_in, shared.w_out, gated_product, kept.beside) if made is None else made()
        return add_gated(part, rows, x, shared.gate, kept_in(x.dtype, kept.rows, kept.total))

    return mixture
