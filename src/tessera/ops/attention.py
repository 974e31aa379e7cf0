"""Paged attention over ranges of any length. T tokens, H heads, D head dim, L positions, S segments.

A pool is `[page, 2, H, token, D]`, keys first. The same call serves decode, chunks and verification: token t of a
segment attends to positions 0 .. positions[t] of its sequence, its own key included (written before).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.buckets import Shape, attend, buckets, gathered
from tessera.ops.narrow import movable, narrowed, picked
from tessera.ops.precision import wide
from tessera.ops.segments import Segments


def write_kv(pool: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    """Writes k and v [T, H, D] of the step's tokens into their pages, in the pool's dtype."""
    at = segments.once("write", lambda: (segments.write_page.long(), segments.write_offset.long()))
    for plane, heads in enumerate((k, v)):
        movable(pool)[:, plane].transpose(1, 2)[at] = movable(narrowed(heads, pool.dtype))


def held(pool: Tensor, segments: Segments, s: int) -> tuple[int, Tensor]:
    """Positions of the sequence of segment s, its own included; and the pages that hold them, [P, ...]."""
    end = int(segments.host_starts[s] + segments.host_lengths[s])
    return end, picked(pool, segments.page_table[s, : -(-end // segments.page_size)].long())


def later(segments: Segments, tokens: slice, length: int) -> Tensor:
    """[T, L]: positions that a token may not see."""
    return torch.arange(length, device=segments.device) > segments.positions[tokens, None]


def paged_attention_reference(q: Tensor, pool: Tensor, segments: Segments, scale: float) -> Tensor:
    """Causal attention of q [T, Hq, D] over the pages of its segment -> [T, Hq, D]; softmax in fp32 or wider.

    Query head h reads key head `h // (Hq / Hk)`. The pool's dtype may differ from q's.
    """
    dtype = wide(q.dtype)
    out = torch.empty_like(q)
    group = q.shape[1] // pool.shape[2]
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        end, pages = held(pool, segments, s)  # [P, 2, H, token, D]
        kv = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end].to(dtype)  # [2, H, L, D]
        k, v = kv.repeat_interleave(group, 1)
        scores = torch.einsum("thd,hld->htl", q[tokens].to(dtype), k) * scale
        weights = scores.masked_fill(later(segments, tokens, end), float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("htl,hld->thd", weights, v).to(q.dtype)
    return out


def paged_attention(q: Tensor, pool: Tensor, segments: Segments, scale: float) -> Tensor:
    """See `paged_attention_reference`. Few flash calls, each over the gathered pages of similar ranges."""
    heads = pool.shape[2]
    shape = Shape(2, heads, q.shape[1] // heads, q.shape[-1], q.dtype)
    out = torch.empty_like(q)
    for bucket in buckets(segments, shape):
        k, v = gathered(pool, shape, bucket)
        attend(q, k, v, bucket, scale, out)
    return out
