"""The experts' MLPs as two of DeepGEMM's grouped products, bf16. Imports deep_gemm, so it is imported where it is
chosen (`ops/backend.py`).

Its products take rows in blocks of one expert each: those that `sort_rows` lists, padded to whole blocks. That pays for
many rows of an expert; few go to our own kernels. R routed rows, M rows of all blocks, E experts, N and K of a weight.
"""

from __future__ import annotations

import deep_gemm
from torch import Tensor

from tessera.ops import triton_moe
from tessera.ops.grouped import padded
from tessera.ops.moe import Dtype
from tessera.ops.triton_combine import combine
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_sort import sort_rows

MANY = 64  # rows an expert on average from which on half-filled blocks cost little


def experts(
    x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, unrounded: bool = False, dtype: Dtype = None
) -> Tensor:
    """See `moe.experts_reference`. What is not to be rounded is ours: these products give bfloat16."""
    if unrounded or ids.numel() < MANY * len(w13) or not len(w13):
        return triton_moe.experts(x, w13, w2, ids, weights, unrounded, dtype)
    return padded_experts(x, w13, w2, ids, weights, dtype)


mixture = triton_moe.mixture_of(experts)


def padded_experts(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, dtype: Dtype = None) -> Tensor:
    """See `moe.experts_reference`: sort, pad, two grouped products, sum."""
    block = deep_gemm.get_mk_alignment_for_contiguous_layout()
    by_expert = sort_rows(ids, len(w13), block)
    rows, groups, places = padded(by_expert.rows, by_expert.blocks, block)
    y = _product(x[rows // ids.shape[1]], w13, groups)
    y = _product(silu_mul(y), w2, groups)
    return combine(y, ids.contiguous(), weights.contiguous(), places, dtype=dtype)


def _product(rows: Tensor, w: Tensor, groups: Tensor) -> Tensor:
    """[M, N]: rows [M, K] times the weights [E, N, K] of their experts."""
    out = rows.new_empty(len(rows), w.shape[1])
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(rows, w, out, groups)
    return out
