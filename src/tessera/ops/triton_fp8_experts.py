"""Experts in fp8, from what gives the rows of many: a token's are added up in its own order, with what every token
visits; few rows read their expert's weights as vectors (`triton_fp8_few.py`). T tokens, k experts a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessera.ops import moe, triton_fp8
from tessera.ops import triton_fp8_few as few
from tessera.ops.fp8 import Fp8Weight
from tessera.ops.fused import Shared, gated_mlp
from tessera.ops.moe import ROUNDED, Beside, Dtype, Kept, Made, Mixture
from tessera.ops.precision import kept_in
from tessera.ops.triton_combine import combine
from tessera.ops.triton_fused import add_gated
from tessera.ops.triton_linear import gated_product

Experts = Callable[..., Tensor]
Rows = tuple[Tensor, Tensor | None]  # what each expert makes of its tokens [.., H]; which is each routed row [T * k]
Routed = Callable[[Tensor, Fp8Weight, Fp8Weight, Tensor, bool], Rows]  # x, w13, w2, ids, unrounded


def is_few(w2: Fp8Weight, ids: Tensor) -> bool:
    """Whether so few rows are not for tiles."""
    return not len(w2.values) or few.pays(ids.numel(), len(w2.values))


def experts_of(routed: Routed) -> Experts:
    """The experts whose many rows `routed` gives."""

    def experts(
        x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor, unrounded: bool = False,
        dtype: Dtype = None,
    ) -> Tensor:  # fmt: skip
        """See `fp8.experts_reference`. Blocks are powers of two; the rows of w13's divide I."""
        if not ids.numel() or not len(w2.values):
            return torch.zeros_like(x, dtype=kept_in(x.dtype, unrounded, dtype))
        x, ids, weights = x if x.stride(1) == 1 else x.contiguous(), ids.contiguous(), weights.contiguous()
        if is_few(w2, ids):
            return few.experts(x, w13, w2, ids, weights, unrounded, dtype)
        y, places = routed(x, w13, w2, ids, unrounded)
        return combine(y, ids, weights, places, dtype=dtype)

    return experts


def mixture_of(routed: Routed) -> Mixture:
    """`moe.mixture_of` these experts; where their rows are many the shared one's are added with them."""
    apart = moe.mixture_of(experts_of(routed), gated_product, add_gated)

    def mixture(
        x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, weights: Tensor, shared: Shared | None,
        made: Made | None = None, kept: Kept = ROUNDED,
    ) -> Tensor:  # fmt: skip
        """See `moe.mixture_of`."""
        if shared is None or is_few(w2, ids):
            return apart(x, w13, w2, ids, weights, shared, made, kept)
        x, ids = x if x.stride(1) == 1 else x.contiguous(), ids.contiguous()
        y, places = routed(x, w13, w2, ids, kept.rows)
        rows = gated_mlp(x, shared.w_in, shared.w_out, gated_product, kept.beside) if made is None else made()
        return combine(y, ids, weights.contiguous(), places, Beside(rows, x, shared.gate), kept.total)

    return mixture


def routed(x: Tensor, w13: Fp8Weight, w2: Fp8Weight, ids: Tensor, unrounded: bool = False) -> Rows:
    """By our tiles."""
    return triton_fp8.rows_of_experts(x, w13, w2, ids, unrounded=unrounded), None


experts, mixture = experts_of(routed), mixture_of(routed)
