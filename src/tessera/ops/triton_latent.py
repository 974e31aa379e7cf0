"""Attention in latent space: all heads of a token are rows of one tile, so that a latent is read once for all of them,
as key and as value (DeepSeek-V2, arXiv 2405.04434).

In a mixed step, a list made on the device says which blocks of rows there are, of the ranges of up to `SHORT` tokens
and of the longer ones; a block's keys are cut into splits by its own end, and programs, as many as the chip holds, go
through blocks and splits until there are none left: what a padded size could hold besides costs nothing. Either kind is
a launch of its own, since tiles for longer ranges need a whole multiprocessor; the second runs beside the first. A last
launch joins the splits, multiplies by the values' weights and writes every token's heads to where they belong.

M rows of a tile, N keys of a tile, H heads, R latent rank, Dr rope dim, V value dim, Q tokens kept of a short range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.triton_common import LOG2E, chained, dot, follow, num_processors
from tessera.ops.triton_linear import by_head
from tessera.ops.triton_softmax import (
    NEVER,
    fold,
    load_rows,
    normalised,
    padded,
    pages_of,
    split_size,
    store_rows,
    token_offsets,
)
from tessera.ops.triton_tiles import Tile, splits_of

# Of a part of a step's ranges, which begins anywhere: no kernel of its own for where.
RANGES = ["cu_lengths", "starts", "lengths", "page_table", "rows", "before"]
SHORT = 8  # tokens of the longest range that has tiles of few rows; a range's own length decides, whatever the others
MOST = (1, 2, 4, 16, 64)  # splits that a kernel which joins them has room for
FEW = 8  # tokens whose splits are joined one by one
WAVES = 2  # parts of short ranges per multiprocessor that the splits aim at


@dataclass(frozen=True, slots=True)
class LatentTiles:
    """Tiles of short and of longer ranges. `split`: of short ones that are alone, and so few that their keys are split;
    `join`: tokens by value dims."""

    short: Tile
    long: Tile
    split: Tile
    join: Tile


# What splits leave is a mean of normed latents: fp16 has the range, and rounds an eighth of what bf16 does.
PARTS = {torch.bfloat16: torch.float16}

# By element size, from one H100; `bench/kernels.py attention --sweep` tries others.
TILES = {2: LatentTiles(Tile(16, 64, 4, 2), Tile(64, 64, 8, 2), Tile(16, 32, 4, 3), Tile(16, 32, 8, 3))}
WIDE = LatentTiles(*[Tile(16, 16, 4, 2)] * 4)  # fp32, on the plain units


@triton.jit(do_not_specialize=["num_segments"], do_not_specialize_on_alignment=RANGES)
def _list_blocks(
    lengths, blocks, counts, num_segments,
    S: tl.constexpr, H: tl.constexpr, SHORT: tl.constexpr, SHORT_M: tl.constexpr, LONG_M: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (segment): writes its blocks (segment, block), after those of the segments before it; long ranges before
    short ones, and of a range the last, which has the most keys, first. `counts` [2]: blocks of long, of short ones."""
    s, at = tl.program_id(0), tl.arange(0, S)
    length = tl.load(lengths + at, mask=at < num_segments, other=0)
    long = tl.where(length > SHORT, tl.cdiv(length * H, LONG_M), 0)
    short = tl.where(length > SHORT, 0, tl.cdiv(length * H, SHORT_M))
    num_long = tl.sum(long, 0)
    if s == 0:
        tl.store(counts, num_long)
        tl.store(counts + 1, tl.sum(short, 0))
    own_long, own_short = tl.sum(tl.where(at == s, long, 0), 0), tl.sum(tl.where(at == s, short, 0), 0)
    own = own_long + own_short
    before_long, before_short = tl.sum(tl.where(at < s, long, 0), 0), tl.sum(tl.where(at < s, short, 0), 0)
    first = tl.where(own_long > 0, before_long, num_long + before_short)
    for n in range(0, own, B):
        i = n + tl.arange(0, B)
        tl.store(blocks + 2 * (first + i), tl.zeros([B], tl.int32) + s, mask=i < own)
        tl.store(blocks + 2 * (first + i) + 1, own - 1 - i, mask=i < own)


@triton.jit
def _part(
    q_latent, q_rope, pool, partial, lse, s, block, split, at, before, cu_lengths, starts, lengths, page_table, scale,
    latent_token, latent_head, rope_token, rope_head, page_stride, token_stride, table_stride, queries, splits,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, PAGE: tl.constexpr,
    BY_TOKEN: tl.constexpr, PREFIX: tl.constexpr, FOLLOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one block of rows. PREFIX: keys are the first `before` [S] of each sequence.

    FOLLOW: where the keys lie is found while the launch before may still run, which must not be what tells it. Results
    lie from row `at` on: BY_TOKEN, or by segment and query. Where a split holds no key that one of the rows
    sees, -inf is all that is written.
    """
    start, length, base = tl.load(starts + s), tl.load(lengths + s), tl.load(cu_lengths + s)  # one latency, not three
    row = block * M + tl.arange(0, M)
    i, h = row // H, row % H
    if PREFIX:
        end, limit = tl.load(before + s), tl.full([M], 2**30, tl.int32)
    else:
        end, limit = start + tl.minimum(length, (block * M + M - 1) // H + 1), start + i + 1
    live, token = i < length, (base + i).to(tl.int64)
    where = (token if BY_TOKEN else (s * queries + i).to(tl.int64)) * H + h
    where = at + where * splits + split
    size = split_size(end, splits, N)
    first = split * size
    last = tl.where(block * M < length * H, tl.minimum(first + size, end), 0)
    table = page_table + s.to(tl.int64) * table_stride
    pages = pages_of(table, first, last, PAGE, N)
    if FOLLOW:
        follow()
    wanted = live & (first < last)
    x = load_rows(q_latent, token * latent_token + h * latent_head, wanted, R, RP, True)
    y = load_rows(q_rope, token * rope_token + h * rope_head, wanted, DR, DRP, True)
    m, total, acc = tl.full([M], NEVER, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, RP], tl.float32)
    for n in tl.range(first, last, N, num_stages=STAGES):
        key = n + tl.arange(0, N)
        inside = key < last  # what lies behind the end may be NaN, and 0 * NaN is NaN
        offset = token_offsets(pages, n, page_stride, token_stride, PAGE, N)
        pages = pages_of(table, n + N, last, PAGE, N)
        latent = load_rows(pool, offset, inside, R, RP, True).to(x.dtype)
        rope = load_rows(pool + R, offset, inside, DR, DRP, True).to(x.dtype)
        scores = dot(y, tl.trans(rope), dot(x, tl.trans(latent), None))
        scores = tl.where((key < limit[:, None]) & inside, scores, float("-inf"))
        weights, shrink, m, total = fold(scores, scale, m, total)
        acc = dot(weights.to(latent.dtype), latent, acc * shrink[:, None])
    acc, sums = normalised(acc, m, total)
    store_rows(partial, where * R, acc, wanted, R, RP)
    tl.store(lse + where, sums, mask=live)


@triton.jit(
    do_not_specialize=["num_blocks", "at", "table_stride", "queries", "splits"], do_not_specialize_on_alignment=RANGES
)
def _latents(
    q_latent, q_rope, pool, partial, lse, blocks, counts, num_blocks, at, before, cu_lengths, starts, lengths,
    page_table, scale, latent_token, latent_head, rope_token, rope_head, page_stride, token_stride, table_stride,
    queries, splits, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr,
    PAGE: tl.constexpr, LISTED: tl.constexpr, LONG: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Any number of programs share the parts of the LONG ranges of a step, or of the others; see `_part`.

    LISTED: `blocks` and `counts` tell them; else there are `num_blocks`, as many of each range as `queries` tokens
    fill. In a list, the others run beside the launch of long ones, of which they need nothing, and end after it.
    """
    if LISTED and LONG:
        follow()
    if LISTED:
        num_long = tl.load(counts)
        num_blocks = num_long if LONG else tl.load(counts + 1)
        blocks += 0 if LONG else 2 * num_long
    for part in range(tl.program_id(0), num_blocks * splits, tl.num_programs(0)):
        number = part // splits
        if LISTED:
            s, block = tl.load(blocks + 2 * number), tl.load(blocks + 2 * number + 1)
        else:
            each = tl.cdiv(queries * H, M)
            s, block = number // each, number % each
        _part(
            q_latent, q_rope, pool, partial, lse, s, block, part % splits, at, before, cu_lengths, starts, lengths,
            page_table, scale, latent_token, latent_head, rope_token, rope_head, page_stride, token_stride,
            table_stride, queries, splits, H, R, RP, DR, DRP, PAGE, LONG, PREFIX, not LISTED, M, N, STAGES,
        )  # fmt: skip
    if LISTED and not LONG:
        follow()


@triton.jit
def _parts_of(
    t, h, live, rows, cu_lengths, lengths, long_at, queries, short_splits, long_splits,
    H: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Where the parts of tokens t and head h begin, and how many there are; 0 for a token of no range."""
    s = tl.load(rows + t, mask=live, other=0)
    length, i = tl.load(lengths + s), t - tl.load(cu_lengths + s)
    at, num = ((s * queries + i).to(tl.int64) * H + h) * short_splits, tl.where(live & (i < length), short_splits, 0)
    if LONG:
        at = tl.where(length > SHORT, long_at + (t.to(tl.int64) * H + h) * long_splits, at)
        num = tl.where((length > SHORT) & (num > 0), long_splits, num)
    return at, num


@triton.jit
def _with_part(acc, partial, part, m, at, num, j, R: tl.constexpr, RP: tl.constexpr, MOST: tl.constexpr):
    """acc [B, RP] with the values of split j of each row, by their weights."""
    values = load_rows(partial, (at + j) * R, j < num, R, RP, True).to(tl.float32)  # need not wait for its weight,
    own = tl.max(tl.where(tl.arange(0, MOST) == j, part, float("-inf")), 1)
    values = tl.where((own > float("-inf"))[:, None], values, 0.0)  # but where that is 0 nobody wrote it
    return acc + values * tl.exp2(own - m)[:, None]


@triton.jit(
    do_not_specialize=["long_at", "queries", "short_splits", "long_splits", "num_tokens"],
    do_not_specialize_on_alignment=RANGES,
)
def _join(
    partial, lse, kv_b, out, sums, rows, cu_lengths, lengths, long_at, queries, short_splits, long_splits, num_tokens,
    weight_head, weight_row,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SHORT: tl.constexpr,
    LONG: tl.constexpr, MOST: tl.constexpr, SUMS: tl.constexpr, B: tl.constexpr, EACH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (B tokens, head, EACH value dims): joins the splits and multiplies by the values' weights, which are
    the rows of `kv_b` [H, D + V, R] after D, N rows at a time. Zeros for tokens of no range. SUMS: writes `sums` too,
    log2 of the sums of exponentials."""
    t, h = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1)
    inside, split = t < num_tokens, tl.arange(0, MOST)
    at, num = _parts_of(  # while the launch before may still run, which is not what tells it
        t, h, inside, rows, cu_lengths, lengths, long_at, queries, short_splits, long_splits, H, SHORT, LONG
    )
    follow()
    part = tl.load(lse + at[:, None] + split, mask=split < num[:, None], other=float("-inf"))
    m = tl.maximum(tl.max(part, 1), NEVER)
    total = tl.sum(tl.exp2(part - m[:, None]), 1)
    seen = tl.where(total > 0, total, 1.0)
    acc = tl.zeros([B, RP], tl.float32)
    if MOST <= 4:  # all are on their way at once
        for j in tl.static_range(MOST):
            acc = _with_part(acc, partial, part, m, at, num, j, R, RP, MOST)
    else:
        for j in range(tl.max(tl.max(tl.where(part > float("-inf"), split + 1, 0), 1), 0)):
            acc = _with_part(acc, partial, part, m, at, num, j, R, RP, MOST)
    acc /= seen[:, None]
    if SUMS:
        tl.store(sums + t * H + h, tl.where(total > 0, m + tl.log2(seen), float("-inf")), mask=inside)
    x = acc.to(kv_b.dtype.element_ty)
    for n in range(tl.program_id(2) * EACH, tl.program_id(2) * EACH + EACH, N):
        v = n + tl.arange(0, N)
        weight = load_rows(kv_b + h * weight_head, (D + v) * weight_row, v < V, R, RP, True)
        where = (t.to(tl.int64) * H + h)[:, None] * V + v
        y = dot(x, tl.trans(weight), None).to(out.dtype.element_ty)
        tl.store(out + where, y, mask=inside[:, None] & (v < V))


@triton.jit(
    do_not_specialize=["long_at", "queries", "short_splits", "long_splits"], do_not_specialize_on_alignment=RANGES
)
def _join_few(
    partial, lse, kv_b, out, rows, cu_lengths, lengths, long_at, queries, short_splits, long_splits, weight_head,
    weight_row, H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    SHORT: tl.constexpr, LONG: tl.constexpr, MOST: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The same for few tokens, where waiting is what costs: program (token, head, N value dims), B splits at a time."""
    t, h, v = tl.program_id(0), tl.program_id(1), tl.program_id(2) * N + tl.arange(0, N)
    weight = load_rows(kv_b + h * weight_head, (D + v) * weight_row, v < V, R, RP, True)
    at, num = _parts_of(
        t, h, True, rows, cu_lengths, lengths, long_at, queries, short_splits, long_splits, H, SHORT, LONG
    )
    follow()
    split = tl.arange(0, MOST)
    part = tl.load(lse + at + split, mask=split < num, other=float("-inf"))
    m = tl.maximum(tl.max(part, 0), NEVER)
    total = tl.sum(tl.exp2(part - m), 0)
    last = tl.max(tl.where(part > float("-inf"), split + 1, 0), 0)
    acc = tl.zeros([RP], tl.float32)
    for first in range(0, last, B):
        j = first + tl.arange(0, B)
        own = tl.load(lse + at + j, mask=j < num, other=float("-inf"))
        values = load_rows(partial, (at + j) * R, j < num, R, RP, True).to(tl.float32)
        values = tl.where((own > float("-inf"))[:, None], values, 0.0)
        acc += tl.sum(values * tl.exp2(own - m)[:, None], 0)
    x = (acc / tl.where(total > 0, total, 1.0)).to(kv_b.dtype.element_ty).to(tl.float32)
    y = tl.sum(weight.to(tl.float32) * x[None, :], 1).to(out.dtype.element_ty)
    tl.store(out + (t.to(tl.int64) * H + h) * V + v, y, mask=v < V)


def attend_latents(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    tiles: LatentTiles | None = None, splits: tuple[int, int] | None = None, before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `mla_absorbed_reference`: [T, H, V]. `tiles` and `splits`, of short and of long ranges, override the tables.

    With `before` [S], ranges above `SHORT` see so many keys, and log2 of the sums of exponentials [T, H] is given too.
    """
    (num_tokens, heads, nope), dim, rank = q_nope.shape, q_rope.shape[-1], kv_b.shape[-1]
    assert q_nope.stride(2) == q_rope.stride(2) == pool.stride(2) == kv_b.stride(2) == 1, "neighbours in a row"
    out = q_nope.new_empty(num_tokens, heads, kv_b.shape[1] - nope)
    sums = None if before is None else q_nope.new_empty(num_tokens, heads, dtype=torch.float32)
    if num_tokens == 0:
        return out, sums
    q_latent = by_head(q_nope, kv_b[:, :nope])
    t = tiles or TILES.get(q_nope.element_size(), WIDE)
    queries, long = min(SHORT, segments.max_length), segments.max_length > SHORT
    short_splits, long_splits = splits or _splits(segments, heads, t, False)
    short_rows = segments.num_segments * queries * heads * short_splits
    rows = short_rows + (num_tokens * heads * long_splits if long else 0)
    partial = q_latent.new_empty(rows, rank, dtype=PARTS.get(q_latent.dtype, q_latent.dtype))
    lse = q_latent.new_empty(rows, dtype=torch.float32)
    ranges = (segments.cu_lengths, segments.starts, segments.lengths, segments.page_table)
    numbers = (
        scale * LOG2E.value, *q_latent.stride()[:2], *q_rope.stride()[:2], *pool.stride()[:2],
        segments.page_table.stride(0),
    )  # fmt: skip
    shape = {"H": heads, "R": rank, "RP": padded(rank)}
    sizes = {**shape, "DR": dim, "DRP": padded(dim), "PAGE": segments.page_size, "LISTED": long}
    blocks, counts = _blocks(segments, heads, t) if long else (None, None)
    processors = num_processors(q_nope.device)
    if long:
        _latents[(processors,)](
            q_latent, q_rope, pool, partial, lse, blocks, counts, 0, short_rows, before, *ranges, *numbers,
            queries, long_splits, **sizes, LONG=True, PREFIX=before is not None, STAGES=t.long.stages,
            M=t.long.m, N=t.long.n, num_warps=t.long.warps, **chained(q_nope.device),
        )  # fmt: skip
    short = t.short if long or short_splits == 1 else t.split
    number = segments.num_segments * triton.cdiv(queries * heads, short.m)
    _latents[(min(2 * processors, number * short_splits) if long else number * short_splits,)](
        q_latent, q_rope, pool, partial, lse, blocks, counts, number, 0, None, *ranges, *numbers,
        queries, short_splits, **sizes, LONG=False, PREFIX=False, STAGES=short.stages,
        M=short.m, N=short.n, num_warps=short.warps, **chained(q_nope.device),
    )  # fmt: skip
    counts, room = (short_rows, queries, short_splits, long_splits), splits or _splits(segments, heads, t, True)
    shape |= {"LONG": long, "MOST": next(n for n in MOST if max(room[: 1 + long]) <= n)}
    _launch_join(partial, lse, kv_b, out, sums, segments, counts, shape, t)
    return out, sums


def _launch_join(
    partial: Tensor, lse: Tensor, kv_b: Tensor, out: Tensor, sums: Tensor | None, segments: Segments,
    counts: tuple[int, int, int, int], shape: dict[str, int], t: LatentTiles,
) -> None:  # fmt: skip
    (num_tokens, heads, value), strides = out.shape, kv_b.stride()[:2]
    ranges = (segments.rows, segments.cu_lengths, segments.lengths, *counts)
    shape |= {"D": kv_b.shape[1] - value, "V": value, "SHORT": SHORT}
    if sums is None and num_tokens <= FEW:
        _join_few[(num_tokens, heads, triton.cdiv(value, 16))](
            partial, lse, kv_b, out, *ranges, *strides, **shape, B=min(16, shape["MOST"]), N=16, num_warps=4,
            **chained(out.device),
        )  # fmt: skip
        return
    b, each = t.join.m, t.join.n
    programs = triton.cdiv(num_tokens, b) * heads
    while each < value and programs * triton.cdiv(value, each) > num_processors(out.device):
        each *= 2  # programs that share a head's value dims join its splits anew, each for itself
    _join[(triton.cdiv(num_tokens, b), heads, triton.cdiv(value, each))](
        partial, lse, kv_b, out, sums, *ranges, num_tokens, *strides, **shape, SUMS=sums is not None, B=b, EACH=each,
        N=t.join.n, num_warps=t.join.warps, num_stages=t.join.stages, **chained(out.device),
    )  # fmt: skip


def _splits(segments: Segments, heads: int, t: LatentTiles, any_length: bool) -> tuple[int, int]:
    """Of the keys of short and of longer ranges, from padded sizes: most short ranges are one token, and a step that
    has longer ones is full of them."""
    short = splits_of(segments, segments.num_segments * triton.cdiv(heads, t.short.m), t.short.n, WAVES, any_length)
    return short, splits_of(segments, segments.num_tokens * heads // t.long.m, t.long.n, 1, any_length)


def _blocks(segments: Segments, heads: int, t: LatentTiles) -> tuple[Tensor, Tensor]:
    """See `_list_blocks`; once per step."""
    return segments.once(("blocks", heads, t.short.m, t.long.m), lambda: _listed(segments, heads, t))


def _listed(segments: Segments, heads: int, t: LatentTiles) -> tuple[Tensor, Tensor]:
    num = segments.num_segments
    most = segments.num_tokens * heads // min(t.short.m, t.long.m) + num
    blocks, counts = segments.lengths.new_empty(most, 2), segments.lengths.new_empty(2)
    _list_blocks[(num,)](
        segments.lengths, blocks, counts, num, S=max(triton.next_power_of_2(num), 64), H=heads, SHORT=SHORT,
        SHORT_M=t.short.m, LONG_M=t.long.m, B=64,
    )  # fmt: skip
    return blocks, counts
