"""Sampling parameters of every row: tensors on the device that change only when a row is entered.

Flags on the host say which launches a step needs, so that a step of plain greedy rows is one argmax.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from tessera.core.messages import SamplingParams
from tessera.ops.upload import upload
from tessera.plan.step import Enter

DRAW, TOP_K, TOP_P, MIN_P, PENALTY, BIAS, MIN_NEW, LOGPROB = (1 << bit for bit in range(8))

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
SEED_MASK = (1 << 63) - 1


def flags_of(params: SamplingParams) -> int:
    """What a row with these parameters needs besides an argmax. Filters of greedy rows change nothing."""
    drawn = params.temperature > 0
    wants = {
        DRAW: drawn,
        TOP_K: drawn and params.top_k > 0,
        TOP_P: drawn and params.top_p < 1,
        MIN_P: drawn and params.min_p > 0,
        PENALTY: params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1,
        BIAS: params.logit_bias,
        MIN_NEW: params.min_new_tokens > 0,
        LOGPROB: params.logprobs >= 0,
    }
    return sum(flag for flag, wanted in wants.items() if wanted)


class RowParams:
    """`floats` [rows, 6] float32 in the order of `FLOATS`; `integers` [rows, 3] int64: top_k, seed, prompt length."""

    def __init__(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.flags = np.zeros(num_rows, np.uint8)
        self.top_k = np.zeros(num_rows, np.int64)  # on the host too, for its maximum
        self.floats = torch.zeros(num_rows, len(FLOATS), dtype=torch.float32, device=device)
        self.integers = torch.zeros(num_rows, 3, dtype=torch.int64, device=device)

    def note(self, enters: Seq[Enter]) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """The host's side of rows that enter; returns what `write` needs, or None when nobody enters."""
        if not enters:
            return None
        for enter in enters:
            self.flags[enter.row] = flags_of(enter.params)
            self.top_k[enter.row] = enter.params.top_k
        integers = [(e.row, e.params.top_k, e.seed & SEED_MASK, e.num_prompt) for e in enters]
        floats = [[getattr(e.params, name) for name in FLOATS] for e in enters]
        return np.array(integers, np.int64), np.array(floats, np.float32)

    def write(self, entered: tuple[NDArray[np.int64], NDArray[np.float32]] | None) -> None:
        """Writes the parameters of rows that enter on the device."""
        if entered is None:
            return
        integers = upload(entered[0], self.device)
        floats = upload(entered[1], self.device)
        self.integers.index_copy_(0, integers[:, 0], integers[:, 1:])
        self.floats.index_copy_(0, integers[:, 0], floats)
