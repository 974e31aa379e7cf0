"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a paged latent cache.

T tokens, H heads, L positions, R latent rank, Dr rope dim, N nope dim, V value dim. A pool is `[page, token, R + Dr]`:
the normed latent, then the roped key that all heads share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.precision import wide
from tessera.ops.segments import Segments


def write_latent(pool: Tensor, latent: Tensor, rope: Tensor, segments: Segments) -> None:
    """Writes latent [T, R] and rope [T, Dr] of the step's tokens into their pages, in the pool's dtype."""
    pool[segments.write_page, segments.write_offset] = torch.cat((latent, rope), -1).to(pool.dtype)


def mla_absorbed_reference(q_latent: Tensor, q_rope: Tensor, pool: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention in latent space: q_latent [T, H, R] (`q_nope @ W_k`), q_rope [T, H, Dr] -> [T, H, R].

    The caller multiplies the result by W_v. Reads R + Dr numbers per position: the form for short ranges.
    """
    dtype = wide(q_latent.dtype)
    rank = q_latent.shape[-1]
    q = torch.cat((q_latent, q_rope), -1).to(dtype)
    out = torch.empty_like(q_latent)
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        cache = _cached(pool, segments, s).to(dtype)
        scores = torch.einsum("thd,ld->htl", q[tokens], cache) * scale
        weights = scores.masked_fill(_later(segments, tokens, len(cache)), float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("htl,lr->thr", weights, cache[:, :rank]).to(out.dtype)
    return out


def mla_expanded_reference(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Attention over keys and values expanded from the latent: q_nope [T, H, N], q_rope [T, H, Dr] -> [T, H, V].

    `kv_b` [H, N + V, R] is `kv_b_proj` viewed per head, keys before values. The form for long ranges.
    """
    dtype = wide(q_nope.dtype)
    nope, rank = q_nope.shape[-1], kv_b.shape[-1]
    out = q_nope.new_empty(*q_nope.shape[:2], kv_b.shape[1] - nope)
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        cache = _cached(pool, segments, s).to(dtype)
        expanded = torch.einsum("lr,hdr->hld", cache[:, :rank], kv_b.to(dtype))
        scores = torch.einsum("thd,hld->htl", q_nope[tokens].to(dtype), expanded[..., :nope])
        scores = (scores + torch.einsum("thd,ld->htl", q_rope[tokens].to(dtype), cache[:, rank:])) * scale
        weights = scores.masked_fill(_later(segments, tokens, len(cache)), float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("htl,hlv->thv", weights, expanded[..., nope:]).to(out.dtype)
    return out


def _cached(pool: Tensor, segments: Segments, s: int) -> Tensor:
    """[L, R + Dr]: what the pages of segment s hold up to its end."""
    end = int(segments.host_starts[s] + segments.host_lengths[s])
    return pool[segments.page_table[s, : -(-end // segments.page_size)].long()].flatten(0, 1)[:end]


def _later(segments: Segments, tokens: slice, length: int) -> Tensor:
    """[T, L]: positions that a token may not see."""
    return torch.arange(length, device=segments.device) > segments.positions[tokens, None]


mla_absorbed = mla_absorbed_reference
mla_expanded = mla_expanded_reference
