"""Cases of `kernels.py`: products of fp8 weights in blocks of 128 x 128, activations quantised in groups of 128.

The time is that of the op: activations are quantised in it. The operations count at the rate of bf16.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernel_case import Case, distance, random
from tessera.ops import fp8, triton_fp8, triton_fp8_rows
from tessera.ops.fused import silu_mul
from tessera.ops.triton_combine import combine
from tessera.ops.triton_fp8 import Tile, Tiles
from tessera.ops.triton_fp8_experts import experts

LINEARS = {"4096 x 4096": (4096, 4096), "24576 x 4096": (24576, 4096), "4096 x 12288": (4096, 12288)}
LINEARS |= {"3648 x 2048": (3648, 2048), "5632 x 2048": (5632, 2048), "2048 x 2816": (2048, 2816)}  # dsv2lite's
EXPERTS = {"dsv2lite": (64, 2048, 1408, 6), "qwen3next": (512, 2048, 512, 10)}
TOKENS = (1, 4, 16, 32, 64, 128, 512, 2048, 8192, 16384)
SWEPT = 512  # tokens up to which the tiles of few rows are tried
LIBRARIES = [{"by": name} for name in ("deep_gemm",) if importlib.util.find_spec(name)]
WIDE = [Tile(128, 128, 8, stages, group) for group in (1, 8) for stages in (3, 4)]
WIDE += [Tile(64, 128, 4, 3, 8), Tile(64, 128, 4, 4, 8), Tile(64, 256, 8, 3, 8)]
UPS = [Tile(128, 64, 8, 3), Tile(128, 64, 8, 3, 8), Tile(128, 64, 8, 4), Tile(64, 64, 4, 3)]  # of experts


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    made: dict[str, Callable[[str], Case]] = {}
    for tokens in TOKENS:
        made |= {f"linear {name}, {tokens}": partial(_linear, size, tokens) for name, size in LINEARS.items()}
        made |= {f"experts {name}, {tokens}": partial(_experts, shape, tokens) for name, shape in EXPERTS.items()}
    made["quantize 8192 x 2048"] = partial(_rows, 8192, 2048, False)
    made["quantize gated 8192 x 2816"] = partial(_rows, 8192, 2816, True)
    return made


def library(name: str) -> Any:
    """Products of fp8 weights by name, for any number of rows."""
    return importlib.import_module(f"tessera.ops.{name}_fp8")


def _rows(tokens: int, columns: int, gated: bool, name: str) -> Case:
    width = columns * (2 if gated else 1)

    def check(x: Tensor, found: Tensor) -> float:
        return distance(found, fp8.quantize(silu_mul(x) if gated else x)[1])

    return Case(
        name, tokens * (2 * width + columns), 0, 2 * tokens * width, make=lambda: random(tokens, width),
        run=lambda x: triton_fp8_rows.quantize(x, gated=gated)[1], check=check,
    )  # fmt: skip


@cache
def _weight(*shape: int) -> tuple[Tensor, Tensor]:
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128), device="cuda") + 0.5
    return (random(*shape) * 50).to(torch.float8_e4m3fn), scales / 50 * shape[-1] ** -0.5


def _linear(size: tuple[int, int], tokens: int, name: str) -> Case:
    weight, scales = _weight(*size)

    def run(made: tuple[Tensor, ...], tile: Tile | None = None, by: str = "") -> Tensor:
        if by:
            return library(by).product(triton_fp8_rows.quantize(made[0]), *made[1:], made[0].dtype)
        return triton_fp8.linear(*made, tile=tile)

    return Case(
        name, weight.nbytes + 2 * tokens * sum(size), 2 * tokens * size[0] * size[1], weight.nbytes,
        make=lambda: (random(tokens, size[1]), weight.clone(), scales), run=run,
        check=lambda made, found: distance(found, fp8.linear_reference(*made)),
        variants=[*LIBRARIES, *({"tile": tile} for tile in WIDE if tokens > SWEPT)],
    )  # fmt: skip


def _experts(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, hidden, inner, top_k = shape
    block = (fp8.GROUP, fp8.GROUP)
    weights = [fp8.Fp8Weight(*_weight(num, *size), block) for size in ((2 * inner, hidden), (hidden, inner))]

    def run(made: tuple[Any, ...], tiles: Tiles | None = None, by: str = "") -> Tensor:
        *routed, weights = made
        if by:
            y, places = library(by).padded_rows(*routed)
            return combine(y, made[3], weights, places)
        if tiles is None:
            return experts(*made)
        return combine(triton_fp8.rows_of_experts(*routed, tiles), made[3], weights)

    touched = num * (1 - (1 - top_k / num) ** tokens)

    def make() -> tuple[Any, ...]:
        ids = torch.rand(tokens, num, device="cuda").topk(top_k, -1).indices
        return random(tokens, hidden), *weights, ids, torch.rand(tokens, top_k, device="cuda")

    return Case(
        f"{name}, {touched:.0f} touched", touched * 3 * hidden * inner + 4 * tokens * hidden,
        6 * tokens * top_k * hidden * inner, round(touched * 3 * hidden * inner),
        make=make, run=run,
        check=lambda made, found: _apart(found, fp8.experts_reference(*made)),
        variants=[
            *LIBRARIES, *({"tiles": tiles} for tiles in _tiles() if tokens > SWEPT),
        ],
    )  # fmt: skip


def _tiles() -> list[Tiles]:
    """Of experts: each way up with each way down."""
    return [Tiles(0, down, up, down) for up in UPS for down in WIDE if down.m == up.m]


def _apart(found: Tensor, expected: Tensor) -> float:
    """In norm: between the products a number on the border of two fp8 numbers goes either way, and few outputs differ
    by more."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
