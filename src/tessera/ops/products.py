"""Attention of few queries as three batched products: what a flash call costs per head and sequence is paid once.

B sequences, H key heads, Q queries of a key head, L positions, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.linear import has_bf16

LEAST = 1 << 18  # elements of the keys; below, three calls cost more than one flash call


def products_pay(device: torch.device, dtype: torch.dtype, keys: int) -> bool:
    """Whether `attend_by_products` is faster than a flash call over `keys` elements of keys."""
    return keys >= LEAST and dtype == torch.bfloat16 and device.type == "cpu" and has_bf16()


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(q k^T * scale + mask) v`: q [B, H, Q, D] over k, v [B, H, L, D] -> [B, H, Q, D], mask [B or 1, 1, Q, L].

    For bfloat16. A product is summed in float32, but comes out rounded: it is taken twice, the second time less what
    the first one gave, so that the scores have 16 bits and the softmax is that of a flash call.
    """
    queries, keys, values = q.flatten(0, 1), k.flatten(0, 1).mT, v.flatten(0, 1)
    rounded = torch.bmm(queries, keys)
    rest = torch.baddbmm(rounded, queries, keys, beta=-1)
    scores = rounded.float().add_(rest).mul_(scale)
    if mask is not None:
        scores.view(*q.shape[:3], -1).add_(mask)
    return torch.bmm(scores.softmax(-1).to(v.dtype), values).unflatten(0, q.shape[:2])
