"""Paged attention in Triton; see `paged_attention_reference` for what it computes.

Two kernels serve a step, each leaving the ranges of the other alone. Ranges of up to `SHORT` tokens (decode, verify)
are bound by memory: their keys are cut into splits, so that few sequences keep a whole chip busy (Flash-Decoding, Dao
et al. 2023). Longer ranges are bound by arithmetic: FlashAttention-2 (arXiv 2307.08691) over tiles of queries. In both
the query heads of a key head are rows of one tile, so that a key is read once for all of them: row r of a range is
query r // G, head r % G. M rows of a tile, N keys of a tile, G query heads of a key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.triton_common import LOG2E, chained, dot, follow
from tessera.ops.triton_softmax import (
    NEVER,
    fold,
    launch_combine,
    load_rows,
    normalised,
    padded,
    pages_of,
    split_size,
    store_rows,
    token_offsets,
)
from tessera.ops.triton_tiles import Tile, result, splits_of, tiles_of

SHORT = 8  # tokens of the longest range that the split kernel takes: by its own length, so that others do not matter
WAVES = 2  # programs per multiprocessor that the splits aim at

# By element size and head dim (64: not measured), from one H100; `bench/kernels.py attention --sweep` tries others.
DECODE = {(2, 64): Tile(16, 128, 4, 2), (2, 128): Tile(16, 64, 2, 2), (2, 256): Tile(16, 32, 4, 2)}
PREFILL = {(2, 64): Tile(128, 128, 8, 2), (2, 128): Tile(128, 128, 8, 2), (2, 256): Tile(128, 64, 8, 2)}
WIDE = Tile(16, 32, 4, 2)  # fp32, on the plain units


@triton.jit
def _tile(
    q, acc, m, total, k_base, v_base, table, pages, n, end, position, scale, page_stride, token_stride,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The sums of M rows after the keys n .. n + N - 1, which lie in `pages`; and the pages of the next."""
    at, key = token_offsets(pages, n, page_stride, token_stride, PAGE, N), n + tl.arange(0, N)
    pages = pages_of(table, n + N, end, PAGE, N)
    k = load_rows(k_base, at, key < end, D, DP, MASKED)  # what lies behind the end may be NaN,
    v = load_rows(v_base, at, key < end, D, DP, MASKED)  # and 0 * NaN is NaN
    scores = dot(q, tl.trans(k.to(q.dtype)), None)
    if MASKED:
        scores = tl.where((key <= position[:, None]) & (key < end), scores, float("-inf"))
    weights, shrink, m, total = fold(scores, scale, m, total)
    acc = dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
    return acc, m, total, pages


@triton.jit(do_not_specialize=["table_stride", "queries", "splits"])
def _decode(
    q, pool, out, partial, lse, cu_lengths, starts, lengths, page_table, scale,
    q_token, q_head, out_token, out_head, page_stride, plane_stride, head_stride, token_stride, table_stride,
    queries, splits, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, SHORT: tl.constexpr,
    WHOLE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (segment, key head, split and block of rows) of ranges of up to SHORT tokens. WHOLE: there is one split,
    whose results go to `out`."""
    follow()
    s, head, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2) % splits, tl.program_id(2) // splits
    start, length, base = tl.load(starts + s), tl.load(lengths + s), tl.load(cu_lengths + s)  # one latency, not three
    if length > SHORT or block * M >= length * G:
        return
    end = start + length
    size = split_size(end, splits, N)
    first = split * size
    if first >= end:
        return
    row = block * M + tl.arange(0, M)
    i, h = row // G, head * G + row % G
    live, token = i < length, (base + i).to(tl.int64)
    x = load_rows(q, token * q_token + h * q_head, live, D, DP, True)
    k_base = pool + head * head_stride
    v_base, table = k_base + plane_stride, page_table + s.to(tl.int64) * table_stride
    m, total, acc = tl.full([M], NEVER, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DP], tl.float32)
    pages = pages_of(table, first, end, PAGE, N)
    for n in range(first, tl.minimum(first + size, end), N):
        acc, m, total, pages = _tile(
            x, acc, m, total, k_base, v_base, table, pages, n, end, start + i, scale, page_stride,
            token_stride, True, D, DP, PAGE, N,
        )  # fmt: skip
    acc, sums = normalised(acc, m, total)
    if WHOLE:
        store_rows(out, token * out_token + h * out_head, acc, live, D, DP)
    else:
        at = (((s * queries + i) * (tl.num_programs(1) * G) + h) * splits + split).to(tl.int64)
        store_rows(partial, at * D, acc, live, D, DP)
        tl.store(lse + at, sums, mask=live)


@triton.jit(do_not_specialize=["table_stride"])
def _prefill(
    q, pool, out, tiles, cu_lengths, starts, lengths, page_table, scale,
    q_token, q_head, out_token, out_head, page_stride, plane_stride, head_stride, token_stride, table_stride,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (key head, tile) of the longer ranges; `tiles` [number, 2]: segment (-1: none) and block of each tile."""
    follow()
    head, tile = tl.program_id(0), tl.program_id(1)
    s = tl.load(tiles + 2 * tile)
    if s < 0:
        return
    block = tl.load(tiles + 2 * tile + 1)
    start, length, base = tl.load(starts + s), tl.load(lengths + s), tl.load(cu_lengths + s)
    row = block * M + tl.arange(0, M)
    i, h = row // G, head * G + row % G
    live, token = i < length, (base + i).to(tl.int64)
    x = load_rows(q, token * q_token + h * q_head, live, D, DP, True)
    k_base = pool + head * head_stride
    v_base, table = k_base + plane_stride, page_table + s.to(tl.int64) * table_stride
    m, total, acc = tl.full([M], NEVER, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DP], tl.float32)
    seen_by_all = (start + block * M // G + 1) // N * N
    end = start + tl.minimum(length, (block * M + M - 1) // G + 1)
    pages = pages_of(table, 0, end, PAGE, N)
    for n in range(0, seen_by_all, N):
        acc, m, total, pages = _tile(
            x, acc, m, total, k_base, v_base, table, pages, n, end, start + i, scale, page_stride,
            token_stride, False, D, DP, PAGE, N,
        )  # fmt: skip
    for n in range(seen_by_all, end, N):
        acc, m, total, pages = _tile(
            x, acc, m, total, k_base, v_base, table, pages, n, end, start + i, scale, page_stride,
            token_stride, True, D, DP, PAGE, N,
        )  # fmt: skip
    acc, _ = normalised(acc, m, total)
    store_rows(out, token * out_token + h * out_head, acc, live, D, DP)


def paged_attention(
    q: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    decode: Tile | None = None, prefill: Tile | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """See `paged_attention_reference`. Only the last dims must be dense; D is best a power of two.

    The pool has q's dtype, or is of fp8. `decode`, `prefill` and `splits` override what the tables say.
    """
    (num_tokens, num_q, dim), num_kv = q.shape, pool.shape[2]
    assert q.stride(2) == pool.stride(4) == 1, "the elements of a head must be neighbours"
    group, out = num_q // num_kv, result(segments, q, *q.shape)
    if num_tokens == 0:
        return out
    key = (q.element_size(), padded(dim))
    ranges = (segments.cu_lengths, segments.starts, segments.lengths, segments.page_table)
    strides = *q.stride()[:2], *out.stride()[:2], *pool.stride()[:4], segments.page_table.stride(0)
    shape = {"G": group, "D": dim, "DP": padded(dim), "PAGE": segments.page_size}
    t = decode or DECODE.get(key, WIDE)
    queries = min(SHORT, segments.max_length)
    blocks = triton.cdiv(queries * group, t.m)
    splits = splits or splits_of(segments, segments.num_segments * num_kv * blocks, t.n, WAVES)
    rows = segments.num_segments * queries * num_q if splits > 1 else 0
    partial, lse = (q.new_empty(rows * splits * n, dtype=torch.float32) for n in (dim, 1))
    _decode[(segments.num_segments, num_kv, splits * blocks)](
        q, pool, out, partial, lse, *ranges, scale * LOG2E.value, *strides, queries, splits, **shape, SHORT=SHORT,
        WHOLE=splits == 1, **t.launch, **chained(q.device),
    )  # fmt: skip
    if splits > 1:
        launch_combine(partial, lse, out, segments, queries, SHORT, splits, t.n)
    if segments.max_length > SHORT:
        t = prefill or PREFILL.get(key, WIDE)
        tiles = tiles_of(segments, group, t.m, SHORT)
        _prefill[(num_kv, len(tiles))](
            q, pool, out, tiles, *ranges, scale * LOG2E.value, *strides, **shape,
            **t.launch, **chained(q.device),
        )  # fmt: skip
    return out
