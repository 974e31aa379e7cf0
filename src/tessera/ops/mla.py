"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a paged latent cache.

T tokens, H heads, L positions, R latent rank, Dr rope dim, N nope dim, V value dim. A pool is `[page, token, R + Dr]`:
the normed latent, then the roped key that all heads share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.attention import held, later
from tessera.ops.buckets import Shape, attend, buckets, gathered
from tessera.ops.narrow import movable, narrowed
from tessera.ops.precision import wide
from tessera.ops.segments import Segments


def write_latent(pool: Tensor, latent: Tensor, rope: Tensor, segments: Segments) -> None:
    """Writes latent [T, R] and rope [T, Dr] of the step's tokens into their pages, in the pool's dtype."""
    entries = narrowed(torch.cat((latent, rope), -1), pool.dtype)
    movable(pool)[segments.write_page, segments.write_offset] = movable(entries)


def mla_absorbed_reference(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
) -> Tensor:
    """Attention in latent space, to which `kv_b` leads queries, and from which it leads results.

    Shapes as in `mla_expanded_reference`. Reads R + Dr numbers per position: the form for short ranges.
    """
    dtype, nope = wide(q_nope.dtype), q_nope.shape[-1]
    rank, (w_k, w_v) = kv_b.shape[-1], kv_b.to(dtype).split((nope, kv_b.shape[1] - nope), 1)
    q = torch.cat((torch.einsum("thn,hnr->thr", q_nope.to(dtype), w_k), q_rope.to(dtype)), -1)
    out = q_nope.new_empty(*q_nope.shape[:2], w_v.shape[1])
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        cache = _cached(pool, segments, s).to(dtype)
        scores = torch.einsum("thd,ld->htl", q[tokens], cache) * scale
        weights = scores.masked_fill(later(segments, tokens, len(cache)), float("-inf")).softmax(-1)
        latent = torch.einsum("htl,lr->thr", weights, cache[:, :rank])
        out[tokens] = torch.einsum("thr,hvr->thv", latent, w_v).to(out.dtype)
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
        weights = scores.masked_fill(later(segments, tokens, len(cache)), float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("htl,hlv->thv", weights, expanded[..., nope:]).to(out.dtype)
    return out


def _cached(pool: Tensor, segments: Segments, s: int) -> Tensor:
    """[L, R + Dr]: what the pages of segment s hold up to its end."""
    end, pages = held(pool, segments, s)
    return pages.flatten(0, 1)[:end]


def mla_absorbed(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
) -> Tensor:
    """See `mla_absorbed_reference`: one key head that all query heads share, whose values are its first R dims.

    The values are not cut to R before the product: a flash call wants keys and values of one width, and a ninth more
    work costs less than a copy.
    """
    nope = q_nope.shape[-1]
    w_k, w_v = kv_b.split((nope, kv_b.shape[1] - nope), 1)
    q_latent = torch.einsum("thn,hnr->thr", q_nope, w_k)
    q = torch.cat((q_latent, q_rope), -1)
    shape = Shape(1, 1, q.shape[1], q.shape[-1], q.dtype)
    out = torch.empty_like(q_latent)
    for bucket in buckets(segments, shape):
        (cache,) = gathered(pool, shape, bucket)
        attend(q, cache, cache, bucket, scale, out)
    return torch.einsum("thr,hvr->thv", out, w_v)


def mla_expanded(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
) -> Tensor:
    """See `mla_expanded_reference`: keys and values of a sequence are expanded once, then attended in causal blocks."""
    nope, (heads, width, rank) = q_nope.shape[-1], kv_b.shape
    value, q = width - nope, torch.cat((q_nope, q_rope), -1)
    dim = max(q.shape[-1], value)  # a flash call wants keys and values of one width
    q = torch.nn.functional.pad(q, (0, dim - q.shape[-1]))
    out = q_nope.new_empty(len(q), heads, value)
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        cache = _cached(pool, segments, s).to(q.dtype)
        expanded = torch.nn.functional.linear(cache[:, :rank], kv_b.flatten(0, 1)).view(-1, heads, width)
        kv = q.new_zeros(2, len(cache), heads, dim)
        kv[0, :, :, :nope] = expanded[..., :nope]
        kv[0, :, :, nope : nope + q_rope.shape[-1]] = cache[:, None, rank:]
        kv[1, :, :, :value] = expanded[..., nope:]
        out[tokens] = _causal(q[tokens], *kv, scale)[..., :value]
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, block: int = 256) -> Tensor:
    """q [n, H, D], the last n positions, over k, v [L, H, D]: blocks of queries, each over the keys up to its end."""
    num, length = len(q), len(k)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    at = torch.arange(length, device=q.device)
    outs = []
    for first in range(0, num, block):
        last = min(first + block, num)
        end = length - num + last
        seen = at[:end] <= at[length - num + first : end, None]
        keys, values = k[:, :, :end], v[:, :, :end]
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, first:last], keys, values, attn_mask=seen, scale=scale
            )
        )
    return torch.cat(outs, 2)[0].transpose(0, 1)
