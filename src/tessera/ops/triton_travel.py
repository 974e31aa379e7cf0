"""`ops/travel.py` in three launches. T tokens, W ranks, k experts a token, E experts, H hidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.travel import Places, Travel, columns_of

CHUNK = 1024  # tokens that a program looks at at once
WIDE = 1024  # columns that it copies or adds at once


@triton.jit(do_not_specialize=["num_tokens"])
def _places(ids_ptr, holds_ptr, nth_ptr, counts_ptr, num_tokens, num_experts, TOP_K: tl.constexpr, CHUNK: tl.constexpr):
    """One program a rank goes through all tokens, in their order."""
    rank = tl.program_id(0)
    taken = 0
    for first in range(0, num_tokens, CHUNK):
        token = first + tl.arange(0, CHUNK)
        valid = token < num_tokens
        wanted = tl.zeros([CHUNK], tl.int32)
        for j in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + token * TOP_K + j, mask=valid, other=0)
            wanted |= tl.load(holds_ptr + rank * num_experts + expert, mask=valid, other=0).to(tl.int32)
        nth = taken + tl.cumsum(wanted, 0) - 1
        tl.store(nth_ptr + rank * num_tokens + token, tl.where(wanted > 0, nth, -1), mask=valid)
        taken += tl.sum(wanted, 0)
    tl.store(counts_ptr + rank, taken.to(tl.int64))


@triton.jit
def _first(counts_ptr, rank, WORLD: tl.constexpr):
    """Rows for the ranks before `rank`."""
    other = tl.arange(0, WORLD)
    return tl.sum(tl.load(counts_ptr + other, mask=other < rank, other=0), 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _pack(
    x_ptr, ids_ptr, scores_ptr, nth_ptr, counts_ptr, rows_ptr, num_tokens, stride_x,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, K_PADDED: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr,
    SCORES_AT: tl.constexpr, IDS_AT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program a token and rank."""
    token, rank = tl.program_id(0), tl.program_id(1)
    nth = tl.load(nth_ptr + rank * num_tokens + token)
    if nth >= 0:
        row = rows_ptr + (_first(counts_ptr, rank, WORLD) + nth) * WIDTH
        x_at = row.to(tl.pointer_type(x_ptr.dtype.element_ty))
        for first in range(0, HIDDEN, WIDE):
            column = first + tl.arange(0, WIDE)
            x = tl.load(x_ptr + token.to(tl.int64) * stride_x + column, mask=column < HIDDEN)
            tl.store(x_at + column, x, mask=column < HIDDEN)
        choice = tl.arange(0, K_PADDED)
        scores = tl.load(scores_ptr + token * TOP_K + choice, mask=choice < TOP_K)
        scores_at = (row + SCORES_AT).to(tl.pointer_type(scores_ptr.dtype.element_ty))
        tl.store(scores_at + choice, scores, mask=choice < TOP_K)
        ids = tl.load(ids_ptr + token * TOP_K + choice, mask=choice < TOP_K).to(tl.int32)
        tl.store((row + IDS_AT).to(tl.pointer_type(tl.int32)) + choice, ids, mask=choice < TOP_K)


@triton.jit(do_not_specialize=["num_tokens"])
def _collect(
    back_ptr, nth_ptr, counts_ptr, out_ptr, num_tokens,
    HIDDEN: tl.constexpr, WORLD: tl.constexpr, RANKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for rank in range(RANKS):
        nth = tl.load(nth_ptr + rank * num_tokens + token)
        row = (_first(counts_ptr, rank, WORLD) + nth) * HIDDEN + column
        total += tl.load(back_ptr + row, mask=(nth >= 0) & (column < HIDDEN), other=0.0).to(tl.float32)
    out = out_ptr + token.to(tl.int64) * HIDDEN + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=column < HIDDEN)


def places(ids: Tensor, holds: Tensor) -> Places:
    """See `travel.places_reference`."""
    (num_tokens, top_k), (num_ranks, num_experts) = ids.shape, holds.shape
    nth = torch.empty(num_ranks, num_tokens, dtype=torch.int32, device=ids.device)
    counts = torch.empty(num_ranks, dtype=torch.int64, device=ids.device)
    _places[num_ranks,](
        ids.contiguous(), holds.view(torch.uint8), nth, counts, num_tokens, num_experts, TOP_K=top_k, CHUNK=CHUNK
    )
    return Places(nth, counts)


def pack(x: Tensor, ids: Tensor, scores: Tensor, where: Places, most: int) -> Tensor:
    """See `travel.pack_reference`."""
    (num_tokens, hidden), top_k = x.shape, ids.shape[1]
    columns, num_ranks = columns_of(x, scores), len(where.counts)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = torch.empty(num_tokens * most, columns.width, dtype=torch.uint8, device=x.device)
    if num_tokens:
        _pack[num_tokens, num_ranks](
            x, ids.contiguous(), scores.contiguous(), *where, rows, num_tokens, x.stride(0),
            HIDDEN=hidden, TOP_K=top_k, K_PADDED=triton.next_power_of_2(top_k),
            WORLD=triton.next_power_of_2(num_ranks), WIDE=min(triton.next_power_of_2(hidden), WIDE),
            SCORES_AT=columns.scores, IDS_AT=columns.ids, WIDTH=columns.width,
        )  # fmt: skip
    return rows


def collect(back: Tensor, where: Places) -> Tensor:
    """See `travel.collect_reference`; up to float32."""
    (num_ranks, num_tokens), hidden = where.nth.shape, back.shape[1]
    out = back.new_empty(num_tokens, hidden)
    wide = min(triton.next_power_of_2(hidden), WIDE)
    if num_tokens:
        _collect[num_tokens, triton.cdiv(hidden, wide)](
            back.contiguous(), *where, out, num_tokens,
            HIDDEN=hidden, WORLD=triton.next_power_of_2(num_ranks), RANKS=num_ranks, WIDE=wide,
        )  # fmt: skip
    return out


TRAVEL = Travel(places, pack, collect)
