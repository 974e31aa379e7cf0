"""Cases of `kernels.py`: what stands between products: norms with their sum, and the sum of a token's experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernel_case import Case, distance, random
from tessera.ops import moe, norm
from tessera.ops.triton_combine import combine
from tessera.ops.triton_fused import add_rmsnorm

ROWS = (1, 64, 512, 8192)
TOP_K = {"dsv2lite": 6, "qwen3next": 10}


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    made: dict[str, Callable[[str], Case]] = {}
    for rows in ROWS:
        for columns in (2048, 4096):
            made[f"add and norm {columns}, {rows} rows"] = partial(_norm, rows, columns)
        for shape, top_k in TOP_K.items():
            made[f"sum of experts {shape}, {rows} rows"] = partial(_combine, rows, top_k)
    return made


def _norm(rows: int, columns: int, name: str) -> Case:
    weight, size = random(columns), 8 * rows * columns

    def run(inputs: tuple[Tensor, Tensor]) -> Tensor:
        return add_rmsnorm(*inputs, weight, 1e-6)[0]

    def check(inputs: tuple[Tensor, Tensor], found: Tensor) -> float:
        return distance(found, norm.add_rmsnorm(*inputs, weight, 1e-6)[0])

    return Case(name, size, 0, size, lambda: (random(rows, columns), random(rows, columns)), run, check)


def _combine(rows: int, top_k: int, name: str) -> Case:
    hidden, size = 2048, 2 * rows * (top_k + 1) * 2048
    ids = torch.zeros(rows, top_k, dtype=torch.int64, device="cuda")
    weights = torch.rand(rows, top_k, device="cuda")

    def run(y: Tensor) -> Tensor:
        return combine(y, ids, weights)

    return Case(
        name, size, 0, size, lambda: random(rows * top_k, hidden), run,
        lambda y, found: distance(found, moe.combine(y, ids, weights)),
    )  # fmt: skip
