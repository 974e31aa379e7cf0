"""Products of fp8 weights by DeepGEMM. Imports deep_gemm, so it is imported where it is chosen (`ops/backend.py`).

It multiplies many rows; few, weights that `deep_gemm_misfit` names, and products that stay wide (those of weights with
scales by block, and grouped ones, give bfloat16) go to our own kernels. Activations come quantised in the layout that
it fetches them in, their scales group by group (`triton_fp8_rows.py`), so it copies nothing. Its grouped product takes
rows in blocks of one expert each. T tokens, P rows of all blocks, E experts, N and K of a weight.
"""

from __future__ import annotations

import deep_gemm
import torch
from torch import Tensor

from tessera.core.quantization import deep_gemm_misfit
from tessera.ops import triton_fp8, triton_fp8_experts
from tessera.ops.fp8 import GROUP, Block, Fp8Weight
from tessera.ops.linear import AfterGate
from tessera.ops.triton_fp8_experts import Rows, experts_of, mixture_of
from tessera.ops.triton_fp8_rows import Quantized, quantize, spread
from tessera.ops.triton_fused import silu_mul
from tessera.ops.triton_sort import sort_rows

# Rows from which on it is ahead: of a weight; of an expert on average, where half-filled blocks cost little.
ROWS, EXPERT_ROWS = 64, 64

deep_gemm.set_pdl(True)  # its products begin as what is before them ends, as our kernels do: 1 us of 8


def linear(x: Tensor, weight: Tensor, scales: Tensor, block: Block = (GROUP, GROUP), unrounded: bool = False) -> Tensor:
    """See `fp8.linear_reference`."""
    if unrounded or len(x) < ROWS or deep_gemm_misfit(block, weight.shape):
        return triton_fp8.linear(x, weight, scales, block, unrounded=unrounded)
    return product(quantize(x), weight, scales, x.dtype)


def gated(x: Tensor, weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """silu(gate) * up of `linear` with a weight [gate | up, K]."""
    if len(x) < ROWS or deep_gemm_misfit(block, weight.shape):
        return triton_fp8.gated(x, weight, scales, block)
    return silu_mul(product(quantize(x), weight, scales, x.dtype))


def after_gate(w: Fp8Weight) -> AfterGate:
    """The product with w of what a gate gives, which is quantised as it is made."""
    ours, misfit = triton_fp8.after_gate(w), deep_gemm_misfit(w.block, w.values.shape)

    def multiply(y: Tensor, unrounded: bool) -> Tensor:
        if unrounded or len(y) < ROWS or misfit:
            return ours.product(y, unrounded)
        return product(quantize(y, gated=True), w.values, w.scales, y.dtype)

    return AfterGate(ours.above, multiply)


def product(x: Quantized, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, K] times weight [N, K] -> [T, N] in `dtype`."""
    y = torch.empty(len(x[0]), len(weight), dtype=dtype, device=weight.device)
    deep_gemm.fp8_gemm_nt(x, (weight, scales), y)
    return y


def routed(x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, unrounded: bool = False) -> Rows:
    """See `triton_fp8_experts.Routed`."""
    misfit = unrounded or any(deep_gemm_misfit(w.block, w.values.shape) for w in (w13, w2))
    if misfit or ids.numel() < EXPERT_ROWS * len(w2.values):
        return triton_fp8_experts.routed(x, w13, w2, ids, unrounded)
    return padded_rows(x, w13, w2, ids)


experts, mixture = experts_of(routed), mixture_of(routed)


def padded_rows(x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor) -> Rows:
    """What each expert makes of its tokens [P, H]: sort, quantise into blocks, two grouped products with gates between.

    The products are told where each expert's rows end, not whose each row is: so they pass by blocks of none.
    """
    block = deep_gemm.get_mk_alignment_for_contiguous_layout()
    found = spread(x, sort_rows(ids, len(w2.values), block), ids.shape[1], block)
    h = quantize(_grouped(found.rows, w13, found.ends, x), gated=True, groups=found.groups)
    return _grouped(h, w2, found.ends, x), found.places


def _grouped(rows: Quantized, w: Fp8Weight, ends: Tensor, like: Tensor) -> Tensor:
    """[P, N] in the dtype of `like`: rows [P, K] times the weights [E, N, K] of their experts."""
    y = like.new_empty(len(rows[0]), w.values.shape[1])
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, (w.values, w.scales), y, ends, use_psum_layout=True)
    return y
