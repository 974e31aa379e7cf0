"""Cases of `kernels.py`: routing and experts of the shapes that the engine is measured with.

Experts are chosen at random. The bytes are those of the experts that are touched on average, and of the rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from kernel_case import Case, distance, random
from torch import Tensor

from tessera.ops import moe
from tessera.ops.backend import backend, expert_runner
from tessera.ops.triton_moe import TILES, Tile, Tiles, experts, grouped_experts
from tessera.ops.triton_moe_few import few_experts
from tessera.ops.triton_route import route

SHAPES = {  # experts, hidden, intermediate, chosen
    "dsv2lite": (64, 2048, 1408, 6),
    "dsv2lite a half": (64, 2048, 704, 6),
    "dsv2lite a quarter": (64, 2048, 352, 6),
    "qwen3next": (512, 2048, 512, 10),
}
TOKENS = (1, 2, 4, 8, 16, 64, 128, 256, 512, 2048, 8192)
RUNNERS = ["grouped_mm", *(["deep_gemm"] if importlib.util.find_spec("deep_gemm") else [])]
SWEPT_FEW, SWEPT_SMALL = 16, 512  # tokens up to which the vector products, and the tiles of few rows, are tried


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    made: dict[str, Callable[[str], Case]] = {}
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            made[f"route {name} {tokens}"] = partial(_route, shape, tokens)
            made[f"experts {name} {tokens}"] = partial(_experts, shape, tokens)
    return made


@cache
def _weights(num: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    return random(num, 2 * inner, hidden) * hidden**-0.5, random(num, hidden, inner) * inner**-0.5


def _route(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, _, _, top_k = shape
    num_bytes = tokens * (2 * num + 12 * top_k)

    def check(logits: Tensor, weights: Tensor) -> float:
        return distance(weights, moe.route(logits, top_k)[1])

    return Case(name, num_bytes, 0, num_bytes, lambda: random(tokens, num), lambda x: route(x, top_k)[1], check)


def _experts(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, hidden, inner, top_k = shape
    weights = _weights(num, hidden, inner)

    def make() -> tuple[Any, ...]:
        ids, scores = route(random(tokens, num), top_k)
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


def _run(inputs: tuple[Any, ...], tiles: Tiles | None = None, few: bool = False, by: str = "") -> Tensor:
    if by:
        return library(by)(*inputs)
    if tiles is not None:
        return grouped_experts(*inputs, tiles)
    return few_experts(*inputs) if few else experts(*inputs)


def _variants(tokens: int) -> list[dict[str, Any]]:
    tried = list(TILES[: 3 if tokens <= SWEPT_SMALL else 4][-3:])
    tried += [
        Tiles(t.rows, replace(t.up, boxed=not t.up.boxed), replace(t.down, boxed=not t.down.boxed)) for t in tried
    ]
    if tokens > SWEPT_SMALL:
        up, down = Tile(128, 128, 64, 8, 4, 8, True), Tile(128, 256, 64, 8, 4, 8, True)
        tried += [Tiles(0, up, down), Tiles(0, replace(up, group=1), replace(down, group=1))]
        tried += [Tiles(0, replace(up, group=4, stages=3), replace(down, group=4, stages=3))]
    few: list[dict[str, Any]] = [{"few": True}] if tokens <= SWEPT_FEW else []
    return few + [{"tiles": tiles} for tiles in tried] + [{"by": name} for name in RUNNERS]
