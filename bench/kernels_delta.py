"""Cases of `kernels.py`: a gated delta net between its projections, Qwen3-Next's layer, states in fp32 and in bf16.

The bytes are y, the outputs, the states and the windows, each read or written once; the operations are those of the
chunked form where ranges are long.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_case import Case, distance, random
from tessera.ops import delta
from tessera.ops.fused import DeltaInputs, delta_net_of
from tessera.ops.segments import make_segments
from tessera.ops.triton_delta import delta_net
from tessera.ops.triton_delta_one import Cut, one
from tessera.ops.triton_delta_step import step

KEYS, VALUES, DIM, KERNEL, CHUNK = 16, 32, 128, 4, 64
CHANNELS = (2 * KEYS + VALUES) * DIM
STEPS = {
    "1 decode": [1],
    "8 decodes": [1] * 8,
    "64 decodes": [1] * 64,
    "512 decodes": [1] * 512,
    "64 ranges of 4": [4] * 64,
    "a range of 4096": [4096],
    "8 ranges of 2048": [2048] * 8,
    "a range of 1024, 256 decodes": [1024] + [1] * 256,
}
CUTS = [
    Cut(*cut)
    for cut in (
        (32, 2, 1), (64, 4, 1), (128, 4, 1), (32, 4, 1), (16, 2, 3), (8, 1, 1), (16, 1, 1), (32, 1, 1), (16, 2, 1),
        (64, 2, 1), (16, 1, 2),
    )
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = delta_net_of(delta.causal_conv, delta.gated_delta_rule)


def cases() -> dict[str, Callable[[str], Case]]:
    """By name."""
    return {
        f"{step}, {dtype} states": partial(_delta, lengths, DTYPES[dtype])
        for step, lengths in STEPS.items()
        for dtype in DTYPES
    }


def _layer() -> tuple[DeltaInputs, int]:
    """Parameters, and the width of y = q | k | v, z, b, a."""
    cuts = pairwise(accumulate((0, CHANNELS, VALUES * DIM, VALUES, VALUES)))
    mixed, z, b, a = (slice(*cut) for cut in cuts)
    keys = KEYS * DIM
    channels = slice(0, keys), slice(keys, 2 * keys), slice(2 * keys, CHANNELS)
    decay, dt_bias = -16 * torch.rand(VALUES, device="cuda"), torch.randn(VALUES, device="cuda") - 3
    norm = torch.ones(DIM, device="cuda", dtype=torch.bfloat16)
    rest = random(CHANNELS, KERNEL), decay, dt_bias, norm, 1e-6
    return DeltaInputs(mixed, z, b, a, channels, KEYS, VALUES, *rest), a.stop


def _delta(lengths: list[int], dtype: torch.dtype, name: str) -> Case:
    count, total, long = len(lengths), sum(lengths), max(lengths) > 8
    inputs, width = _layer()
    form = "chunked" if max(lengths) > 1 else "recurrent"
    slots, window = np.arange(1, count + 1), CHANNELS * (KERNEL - 1)

    def make() -> tuple[Any, ...]:
        ranges = np.array(lengths, np.int32)
        segments = make_segments(0 * ranges, ranges, np.zeros((count, 64), np.int32), slots, 64, "cuda")
        state = torch.randn(count + 1, VALUES, DIM, DIM, device="cuda").to(dtype)
        return random(total, width), random(count + 1, CHANNELS, KERNEL - 1), state, segments

    def run(made: tuple[Any, ...], cut: Cut | None = None, whole: bool = False) -> Tensor:
        y, conv, state, segments = made
        if cut is None and not whole:
            return delta_net(y, inputs, conv, state, segments, form)
        out = torch.empty(total, VALUES * DIM, dtype=y.dtype, device="cuda")
        step(y, inputs, conv, state, segments, total, out) if whole else one(y, inputs, conv, state, segments, out, cut)
        return out

    def check(made: tuple[Any, ...], _: Tensor) -> float:
        y, conv, state, segments = made
        copies = tuple(kept.to(torch.float32, copy=True) for kept in (conv, state))
        expected = PLAIN(y.float(), inputs, *copies, segments, form)
        return max(distance(run(made), expected), distance(state[1:], copies[1][1:]))

    size = torch.empty(0, dtype=dtype).element_size()
    num_bytes = 2 * count * (VALUES * DIM * DIM * size + 2 * window) + 2 * total * (width + VALUES * DIM)
    operations = total * VALUES * (6 * DIM * DIM + 10 * CHUNK * DIM) if long else 0
    variants = [{"whole": True}, *({"cut": cut} for cut in CUTS)] if count >= 64 and max(lengths) == 1 else []
    return Case(name, num_bytes, operations, num_bytes, make, run, check, variants)
