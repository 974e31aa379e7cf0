"""Cases of `kernels.py`: products of few rows with the weights of the models that the engine is measured with.

`library`: torch's product, and what gates it as a kernel of its own. Calls follow each other as layers do, so a launch
may load its weights while the one before it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from kernel_case import Case, distance, random
from tessera.ops.fused import silu_mul as plain_silu_mul
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_linear import Tile, few_rows

SHAPES = {  # rows and columns of the weight, and whether it is gate | up
    "qwen3-8b in": (6144, 4096, False),
    "qwen3-8b out": (4096, 4096, False),
    "qwen3-8b gate up": (24576, 4096, True),
    "qwen3-8b down": (4096, 12288, False),
    "qwen3-8b head": (151936, 4096, False),
    "dsv2lite in": (3648, 2048, False),
    "dsv2lite out": (2048, 2048, False),
    "dsv2lite shared gate up": (5632, 2048, True),
    "dsv2lite shared down": (2048, 2816, False),
    "dsv2lite dense gate up": (21888, 2048, True),
    "dsv2lite dense down": (2048, 10944, False),
    "dsv2lite head": (102400, 2048, False),
    "qwen3next attention in": (9216, 2048, False),
    "qwen3next delta in": (12352, 2048, False),
    "qwen3next out": (2048, 4096, False),
    "qwen3next shared gate up": (1024, 2048, True),
    "qwen3next shared down": (2048, 512, False),
}
ROWS = (1, 2, 4, 8)
SWEPT = (
    Tile(1024, 512, 1),
    Tile(2048, 512, 1),
    Tile(1024, 1024, 1),
    Tile(2048, 1024, 1),
    Tile(4096, 1024, 1),
    Tile(2048, 2048, 1),
    Tile(4096, 2048, 1),
    Tile(4096, 1024, 2),
    Tile(8192, 1024, 2),
    Tile(4096, 2048, 2),
    Tile(8192, 2048, 4),
    Tile(8192, 4096, 4),
)


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    return {f"{name}, {rows} rows": partial(_case, shape, rows) for name, shape in SHAPES.items() for rows in ROWS}


def _case(shape: tuple[int, int, bool], rows: int, name: str) -> Case:
    out, depth, gated = shape

    def make() -> tuple[Tensor, Tensor]:
        return random(rows, depth), random(out, depth) * depth**-0.5

    def run(inputs: tuple[Tensor, Tensor], tile: Tile | None = None, library: bool = False) -> Tensor:
        if library:
            y = linear(*inputs)
            return silu_mul(y) if gated else y
        return few_rows(*inputs, gated=gated, tile=tile)

    def check(inputs: tuple[Tensor, Tensor], found: Tensor) -> float:
        y = linear(*(x.float() for x in inputs))
        return distance(found, plain_silu_mul(y) if gated else y)

    size = 2 * out * depth
    moved = size + 2 * rows * (depth + out // (2 if gated else 1))
    variants: list[dict[str, Any]] = [{"library": True}, *({"tile": tile} for tile in SWEPT)]
    return Case(name, moved, 2 * rows * out * depth, size, make, run, check, variants)
