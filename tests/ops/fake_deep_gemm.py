"""DeepGEMM's products by what its host code checks and its kernels read (compute capability 9), on CPU.

Rows of no group hold whatever was in memory: what comes of them is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from tessera.ops.fp8 import dequantize

BLOCK, HALF = 128, 64  # rows of a block, and of the half that one group of threads computes
Pair = tuple[Tensor, Tensor]


@dataclass
class Calls:
    """How often each product ran."""

    made: list[str] = field(default_factory=list)


def _left(a: Pair) -> Tensor:
    """[M, K] as it is multiplied."""
    values, scales = a
    rows, columns = values.shape
    assert values.dtype == torch.float8_e4m3fn
    assert values.is_contiguous(), "K-major"
    assert columns % 16 == 0, "rows of 16 bytes"
    assert scales.dtype == torch.float32
    assert scales.shape == (rows, -(-columns // 128))
    assert scales.stride() == (1, -(-rows // 4) * 4), "else it copies them"
    assert not scales.data_ptr() % 16
    return dequantize(values, scales, (1, 128))


def _right(b: Pair) -> Tensor:
    """[..., N, K] as it is multiplied."""
    values, scales = b
    *outer, rows, columns = values.shape
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert values.is_contiguous()
    assert scales.is_contiguous()
    assert rows % 8 == 0
    assert scales.shape == (*outer, -(-rows // 128), -(-columns // 128))
    return dequantize(values, scales, (128, 128))


def _groups(ends: Tensor, num_groups: int, rows: int) -> Tensor:
    """Of each row, from the ends of all."""
    assert ends.dtype == torch.int32
    assert ends.is_contiguous()
    assert ends.shape == (num_groups,)
    groups, end = torch.full((rows,), -1, dtype=torch.int32, device=ends.device), 0
    for group, last in enumerate(ends.tolist()):
        first = -(-end // BLOCK) * BLOCK
        assert last >= first
        groups[first:last], end = group, last
    return groups


def make(calls: Calls) -> ModuleType:
    """The module `deep_gemm`."""
    module = ModuleType("deep_gemm")

    def fp8_gemm_nt(a: Pair, b: Pair, d: Tensor) -> None:
        calls.made.append("product")
        assert d.dtype == torch.bfloat16
        assert d.is_contiguous()
        d.copy_(_left(a) @ _right(b).T)

    def m_grouped_fp8_gemm_nt_contiguous(a: Pair, b: Pair, d: Tensor, ends: Tensor, use_psum_layout: bool) -> None:
        calls.made.append("grouped")
        rows, weights = _left(a), _right(b)
        assert use_psum_layout, "else the integers would be whose each row is"
        groups = _groups(ends, len(weights), len(rows))
        assert d.dtype == torch.bfloat16
        assert d.is_contiguous()
        assert len(rows) % BLOCK == 0
        for first in range(0, len(rows), HALF):
            block, half = first - first % BLOCK, slice(first, first + HALF)
            own = groups[block : block + BLOCK].tolist()
            held = [group for group in own if group >= 0]
            assert len(set(held)) <= 1, "one expert a block"
            assert own[: len(held)] == held, "padding follows rows"
            if not held:
                continue  # passed by
            d[half] = rows[half] @ weights[own[0]].T if groups[first] >= 0 else 0
        d[groups < 0] = float("nan")

    module.__dict__.update(
        fp8_gemm_nt=fp8_gemm_nt,
        m_grouped_fp8_gemm_nt_contiguous=m_grouped_fp8_gemm_nt_contiguous,
        get_mk_alignment_for_contiguous_layout=lambda: BLOCK,
        set_pdl=lambda on: None,
    )
    return module
