"""Cases of `kernels.py`: routing and experts of the shapes that the engine is measured with.

Experts are chosen at random. The bytes are those of the experts that are touched on average, and of the rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernel_case import Case, distance, random
from tessera.ops import fused, moe
from tessera.ops.backend import backend, expert_runner
from tessera.ops.fused import Shared
from tessera.ops.moe import Router, Rules
from tessera.ops.triton_fused import add_gated
from tessera.ops.triton_linear import Tile as RowTile
from tessera.ops.triton_linear import gated_product, pack
from tessera.ops.triton_moe import TILES, Tile, Tiles, experts, grouped_experts, mixture
from tessera.ops.triton_moe_few import few_experts
from tessera.ops.triton_route import SCORING, choose_apart, route, score_and_route
from tessera.ops.triton_scores import ScoreTile

HIDDEN = 2048

SHAPES = {  # experts, hidden, intermediate, chosen
    "dsv2lite": (64, 2048, 1408, 6),
    "dsv2lite a half": (64, 2048, 704, 6),
    "dsv2lite a quarter": (64, 2048, 352, 6),
    "qwen3next": (512, 2048, 512, 10),
}
TOKENS = (1, 2, 4, 8, 16, 64, 128, 256, 512, 2048, 8192, 16384, 32768)
RUNNERS = ["grouped_mm", *(["deep_gemm"] if importlib.util.find_spec("deep_gemm") else [])]
ROUTERS = {  # experts, whether scored in fp32, rules
    "dsv2lite": (64, True, Rules(6, normalize=False)),
    "qwen3next": (512, False, Rules(10)),
    "deepseek v3": (256, True, Rules(8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", scale=2.5)),
}
SHARED = {"dsv2lite": (2, False), "qwen3next": (1, True)}  # experts that it consists of, and whether it is gated
SWEPT_VECTORS: list[dict[str, Any]] = [
    *({"up": RowTile(n * k, k, warps)} for n, k, warps in (
        (1, 1024, 1), (2, 1024, 1), (1, 2048, 1), (2, 512, 1), (4, 512, 1), (1, 2048, 2), (2, 2048, 2), (2, 2048, 4),
        (4, 2048, 4),
    )),
    *({"down": RowTile(numbers, k, warps)} for numbers in (4096, 8192, 16384, 32768) for k in (512, 2048)
      for warps in (1, 2, 4, 8) if 1024 <= numbers // warps <= 8192),
]  # fmt: skip
SWEPT_FEW, SWEPT_SMALL = 16, 512  # tokens up to which the vector products, and the tiles of few rows, are tried
SWEPT_MANY = 8192  # tokens from which on these tiles are, by M: N, K, warps and stages of the two products
SWEPT_TILES: dict[int, tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]] = {
    64: (
        [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3)],
        [(128, 64, 4, 3), (128, 64, 4, 4), (256, 64, 4, 2), (256, 64, 4, 3)],
    ),
    128: (
        [(128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 6), (64, 64, 4, 3), (64, 64, 8, 3)],
        [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3)],
    ),
    256: ([(64, 64, 8, 3), (64, 64, 8, 4)], [(128, 64, 8, 3), (128, 64, 8, 4)]),
}


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    made: dict[str, Callable[[str], Case]] = {}
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            made[f"route {name} {tokens}"] = partial(_route, shape, tokens)
            made[f"experts {name} {tokens}"] = partial(_experts, shape, tokens)
    for name, router in ROUTERS.items():
        for tokens in (1, 2, 4, 8, 16):
            made[f"scores and route {name} {tokens}"] = partial(_scores, router, tokens)
        for tokens in (16, 64, 128, 512, 2048, 8192, 16384) if router[1] else ():
            made[f"scores apart {name} {tokens}"] = partial(_many_scores, router, tokens)
    for name, shared in SHARED.items():
        for tokens in (1, 2, 4):
            made[f"with shared {name} {tokens}"] = partial(_mixture, SHAPES[name], shared, tokens)
    return made


@cache
def _weights(num: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    return random(num, 2 * inner, hidden) * hidden**-0.5, random(num, hidden, inner) * inner**-0.5


def _route(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, _, _, top_k = shape
    num_bytes = tokens * (2 * num + 12 * top_k)

    def check(logits: Tensor, weights: Tensor) -> float:
        return distance(weights, moe.route(logits, Rules(top_k))[1])

    return Case(name, num_bytes, 0, num_bytes, lambda: random(tokens, num), lambda x: route(x, Rules(top_k))[1], check)


def _experts(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, hidden, inner, top_k = shape
    weights = _weights(num, hidden, inner)

    def make() -> tuple[Any, ...]:
        ids, scores = route(random(tokens, num), Rules(top_k))
        return random(tokens, hidden), *weights, ids, scores

    touched = num * (1 - (1 - top_k / num) ** tokens)
    rows = 4 * tokens * hidden
    return Case(
        f"{name}, {touched:.0f} touched", touched * 6 * hidden * inner + rows, 6 * tokens * top_k * hidden * inner,
        set_bytes=round(touched * 6 * hidden * inner), make=make, run=_run,
        check=lambda inputs, found: distance(found, moe.experts(*inputs)), variants=_variants(tokens),
    )  # fmt: skip


@cache
def library(name: str) -> Callable[..., Tensor]:
    """The experts of a runner by its name."""
    return expert_runner(name, backend("triton")).experts


def _scores(router: tuple[int, bool, Rules], tokens: int, name: str) -> Case:
    num, wide, rules = router

    def make() -> tuple[Tensor, Router]:
        weight = random(num, HIDDEN) * HIDDEN**-0.5
        counts = torch.zeros(16, dtype=torch.int32, device="cuda")
        return random(tokens, HIDDEN), Router(pack(weight.float() if wide else weight), wide, rules, counts)

    def run(inputs: tuple[Tensor, Router], tile: RowTile | None = None, apart: bool = False) -> Tensor:
        x, router = inputs
        if apart:  # as it was: the library's product, then the choice
            scores = linear(x.float() if wide else x, router.weight.weight)
            return route(scores, rules)[1]
        return score_and_route(x, router, tile or SCORING)[1]

    def check(inputs: tuple[Tensor, Router], weights: Tensor) -> float:
        return distance(weights, moe.choose(*inputs)[1])

    num_bytes = num * HIDDEN * (4 if wide else 2)
    tiles = [RowTile(n * 2048, 2048, warps) for warps in (1, 2, 4) for n in (1, 2, 4)]
    variants: list[dict[str, Any]] = [{"apart": True}, *({"tile": tile} for tile in tiles)]
    return Case(name, num_bytes, 0, num_bytes, make, run, check, variants)


def _many_scores(router: tuple[int, bool, Rules], tokens: int, name: str) -> Case:
    num, _, rules = router
    none = torch.zeros(0, dtype=torch.int32, device="cuda")

    def make() -> tuple[Tensor, Router]:
        return random(tokens, HIDDEN), Router(pack(random(num, HIDDEN).float() * HIDDEN**-0.5), True, rules, none)

    def run(inputs: tuple[Tensor, Router], tile: ScoreTile | None = None, library: str = "") -> Tensor:
        x, weight = inputs[0], inputs[1].weight.weight
        if library == "fp32":  # as it was
            return route(linear(x.float(), weight), rules)[1]
        if library == "bf16":  # for weights that are numbers of bfloat16
            return route(torch.mm(x, weight.bfloat16().T, out_dtype=torch.float32), rules)[1]
        return choose_apart(x, inputs[1], tile)[1]

    def check(inputs: tuple[Tensor, Router], weights: Tensor) -> float:
        return distance(weights, moe.choose(*inputs)[1])

    sizes = ((64, 16, 64, 4), (64, 16, 128, 3), (64, 32, 64, 4), (64, 64, 64, 4), (64, 128, 64, 3))
    variants: list[dict[str, Any]] = [{"library": "fp32"}, {"library": "bf16"}]
    variants += [{"tile": ScoreTile(0, n, m, k, 8 if m > 64 else 4, stages)} for n, m, k, stages in sizes]
    num_bytes = 2 * tokens * HIDDEN + 4 * num * (HIDDEN + tokens)
    return Case(name, num_bytes, 2 * tokens * num * HIDDEN, 2 * tokens * HIDDEN, make, run, check, variants)


def _mixture(shape: tuple[int, int, int, int], shared: tuple[int, bool], tokens: int, name: str) -> Case:
    num, hidden, inner, top_k = shape
    (parts, gated), weights = shared, _weights(num, hidden, inner)
    width = parts * inner

    def make() -> tuple[Any, ...]:
        ids, scores = route(random(tokens, num), Rules(top_k))
        gate = pack(random(1, hidden) * hidden**-0.5) if gated else None
        both = pack(random(2 * width, hidden) * hidden**-0.5), pack(random(hidden, width) * width**-0.5)
        return random(tokens, hidden), *weights, ids, scores, Shared(*both, gate)

    def run(inputs: tuple[Any, ...], apart: bool = False, joined: bool = False, **tiles: RowTile) -> Tensor:
        if apart:
            return apart_mixture(*inputs)
        return few_experts(*inputs, **tiles) if joined or tiles else mixture(*inputs)

    plain = moe.mixture_of(moe.experts, fused.gated_product, fused.add_gated)
    apart_mixture = moe.mixture_of(experts, gated_product, add_gated)
    touched = num * (1 - (1 - top_k / num) ** tokens) + parts
    return Case(
        name, touched * 6 * hidden * inner, 6 * tokens * (top_k + parts) * hidden * inner,
        set_bytes=round(touched * 6 * hidden * inner), make=make, run=run,
        check=lambda inputs, found: distance(found, plain(*inputs)),
        variants=[{"apart": True}, {"joined": True}, *SWEPT_VECTORS],
    )  # fmt: skip


def _run(inputs: tuple[Any, ...], tiles: Tiles | None = None, few: bool = False, by: str = "") -> Tensor:
    if by:
        return library(by)(*inputs)
    if tiles is not None:
        return grouped_experts(*inputs, tiles)
    return few_experts(*inputs) if few else experts(*inputs)


def _variants(tokens: int) -> list[dict[str, Any]]:
    tried = list(TILES[: 3 if tokens <= SWEPT_SMALL else 4][-3 if tokens < SWEPT_MANY else -1 :])
    tried += [
        Tiles(t.rows, replace(t.up, boxed=not t.up.boxed), replace(t.down, boxed=not t.down.boxed)) for t in tried
    ]
    if tokens >= SWEPT_MANY:
        tried += _many_rows()
    few: list[dict[str, Any]] = [{"few": True}] if tokens <= SWEPT_FEW else []
    return few + [{"tiles": tiles} for tiles in tried] + [{"by": name} for name in RUNNERS]


def _many_rows() -> list[Tiles]:
    """Each tile of one product with the first of the other; the first two also in other orders."""
    found = []
    for m, cuts in SWEPT_TILES.items():
        ups, downs = ([Tile(m, *cut, boxed=True) for cut in each] for each in cuts)
        up, down = ups[0], downs[0]
        found += [
            Tiles(0, up, down),
            *(Tiles(0, one, down) for one in ups[1:]),
            *(Tiles(0, up, one) for one in downs[1:]),
        ]
        found += [Tiles(0, replace(up, group=group), replace(down, group=group)) for group in (2, 8)]
    return found
