"""Cases of `kernels.py`: products of fp8 weights in blocks of 128 x 128, activations quantised in groups of 128.

The time is that of the op: activations are quantised in it. The operations count at the rate of bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from kernel_case import Case, distance, random
from torch import Tensor

from tessera.ops import fp8, triton_fp8

LINEARS = {"4096 x 4096": (4096, 4096), "24576 x 4096": (24576, 4096), "4096 x 12288": (4096, 12288)}
EXPERTS = {"dsv2lite": (64, 2048, 1408, 6), "qwen3next": (512, 2048, 512, 10)}
TOKENS = (1, 4, 64, 512, 8192)


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    made: dict[str, Callable[[str], Case]] = {}
    for tokens in TOKENS:
        made |= {f"linear {name}, {tokens}": partial(_linear, size, tokens) for name, size in LINEARS.items()}
        made |= {f"experts {name}, {tokens}": partial(_experts, shape, tokens) for name, shape in EXPERTS.items()}
    return made


@cache
def _weight(*shape: int) -> tuple[Tensor, Tensor]:
    scales = torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128, device="cuda") + 0.5
    return (random(*shape) * 50).to(torch.float8_e4m3fn), scales / 50 * shape[-1] ** -0.5


def _linear(size: tuple[int, int], tokens: int, name: str) -> Case:
    weight, scales = _weight(*size)
    return Case(
        name, weight.nbytes + 2 * tokens * sum(size), 2 * tokens * size[0] * size[1], weight.nbytes,
        make=lambda: (random(tokens, size[1]), weight.clone(), scales), run=lambda made: triton_fp8.linear(*made),
        check=lambda made, found: distance(found, fp8.linear_reference(*made)),
    )  # fmt: skip


def _experts(shape: tuple[int, int, int, int], tokens: int, name: str) -> Case:
    num, hidden, inner, top_k = shape
    block = (fp8.GROUP, fp8.GROUP)
    weights = [fp8.Fp8Weight(*_weight(num, *size), block) for size in ((2 * inner, hidden), (hidden, inner))]
    touched = num * (1 - (1 - top_k / num) ** tokens)

    def make() -> tuple[Any, ...]:
        ids = torch.rand(tokens, num, device="cuda").topk(top_k, -1).indices
        return random(tokens, hidden), *weights, ids, torch.rand(tokens, top_k, device="cuda")

    return Case(
        f"{name}, {touched:.0f} touched", touched * 3 * hidden * inner + 4 * tokens * hidden,
        6 * tokens * top_k * hidden * inner, round(touched * 3 * hidden * inner),
        make=make, run=lambda made: triton_fp8.experts(*made),
        check=lambda made, found: _apart(found, fp8.experts_reference(*made)),
    )  # fmt: skip


def _apart(found: Tensor, expected: Tensor) -> float:
    """In norm: between the products a number on the border of two fp8 numbers goes either way, and few outputs differ
    by more."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()
