"""Multi-head latent attention in Triton; see `mla.py` for what the two forms compute.

Absorbed: all heads of a token are rows of one tile, so that a latent is read once for all of them, as key and as value.
Short ranges have their keys cut into splits, longer ones go by tiles of rows. Expanded: the step's own tokens become
keys and values once, of a size that T bounds, and a flash kernel runs over them; what precedes a range is attended in
latent space, of whatever length it is, and is where the flash kernel's running softmax begins. So both serve any step,
and in a graph. Where the host knows the lengths, what precedes a long range is expanded too.

M rows of a tile, N keys of a tile, H heads, R latent rank, Dr rope dim, L expanded positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.narrow import picked
from tessera.ops.segments import Segments
from tessera.ops.triton_common import LOG2E, dot
from tessera.ops.triton_softmax import (
    NEVER,
    fold,
    launch_combine,
    load_rows,
    normalised,
    padded,
    split_size,
    store_rows,
    token_offsets,
)
from tessera.ops.triton_tiles import Tile, result, splits_of, tiles_of
from tessera.ops.upload import upload

SHORT = 8  # tokens of the longest range that is split; a range's own length decides, whatever the others
WAVES = 2  # programs per multiprocessor that the splits aim at
PAYS = 192  # tokens of a range from which on expanding what precedes it costs less than attending it in latent space:
# expanding takes 2 R (N + V) operations a head and position, attending in latent space 2 (2 R - N - V) more a query
MOST_BYTES = 1 << 30  # of expanded keys and values; past that, only those of the step's own tokens

# By element size, from one H100; `bench/kernels.py attention --sweep` tries others.
SPLIT = {2: Tile(16, 64, 4, 4)}
LONG = {2: Tile(64, 64, 8, 2)}
OWN = {2: Tile(128, 64, 8, 3)}
WIDE = Tile(16, 16, 4, 2)  # fp32, on the plain units


@triton.jit
def _latent_tile(
    q_latent, q_rope, acc, m, total, pool, table, n, end, limit, scale, page_stride, token_stride,
    R: tl.constexpr, RP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, PAGE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The sums of M rows after the latents n .. n + N - 1; row r sees those below `limit[r]`."""
    at, key = token_offsets(table, n, end, page_stride, token_stride, PAGE, N), n + tl.arange(0, N)
    inside = key < end  # what lies behind the end may be NaN, and 0 * NaN is NaN
    latent = load_rows(pool, at, inside, R, RP, True).to(q_latent.dtype)
    rope = load_rows(pool + R, at, inside, DR, DRP, True).to(q_latent.dtype)
    scores = dot(q_rope, tl.trans(rope), dot(q_latent, tl.trans(latent), None))
    scores = tl.where(key < tl.minimum(limit, end)[:, None], scores, float("-inf"))
    weights, shrink, m, total = fold(scores, scale, m, total)
    acc = dot(weights.to(latent.dtype), latent, acc * shrink[:, None])
    return acc, m, total


@triton.jit
def _absorbed(
    q_latent, q_rope, pool, out, partial, lse, tiles, before, cu_lengths, starts, lengths, page_table, scale,
    latent_token, latent_head, rope_token, rope_head, out_token, out_head, page_stride, token_stride, table_stride,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, PAGE: tl.constexpr,
    SHORT: tl.constexpr, Q: tl.constexpr, SPLITS: tl.constexpr, TILED: tl.constexpr, PREFIX: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (segment, block of rows, split) of short ranges, or (tile, 0, 0) of others.

    PREFIX: keys are the first `before` [S] of each sequence, and `lse` [T, H] is written. Splits go to `partial`.
    """
    s, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TILED:
        block = tl.load(tiles + 2 * s + 1)
        s = tl.load(tiles + 2 * s)
        if s < 0:
            return
    start, length, base = tl.load(starts + s), tl.load(lengths + s), tl.load(cu_lengths + s)  # one latency, not three
    if length > SHORT or block * M >= length * H:
        return
    row = block * M + tl.arange(0, M)
    i, h = row // H, row % H
    if PREFIX:
        end, limit = tl.load(before + s), tl.full([M], 2**30, tl.int32)
    else:
        end, limit = start + tl.minimum(length, (block * M + M - 1) // H + 1), start + i + 1
    size = split_size(start + length, SPLITS, N) if SPLITS > 1 else end
    first = split * size
    if first >= start + length:
        return
    live, token = i < length, (base + i).to(tl.int64)
    x = load_rows(q_latent, token * latent_token + h * latent_head, live, R, RP, True)
    y = load_rows(q_rope, token * rope_token + h * rope_head, live, DR, DRP, True)
    table = page_table + s.to(tl.int64) * table_stride
    m, total, acc = tl.full([M], NEVER, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, RP], tl.float32)
    for n in range(first, tl.minimum(first + size, end), N):
        acc, m, total = _latent_tile(
            x, y, acc, m, total, pool, table, n, end, limit, scale, page_stride, token_stride,
            R, RP, DR, DRP, PAGE, N,
        )  # fmt: skip
    acc, sums = normalised(acc, m, total)
    if SPLITS == 1:
        store_rows(out, token * out_token + h * out_head, acc, live, R, RP)
        if PREFIX:
            tl.store(lse + token * H + h, sums, mask=live)
    else:
        at = (((s * Q + i) * H + h) * SPLITS + split).to(tl.int64)
        store_rows(partial, at * R, acc, live, R, RP)
        tl.store(lse + at, sums, mask=live)


@triton.jit
def _scores(
    q_nope, q_rope, k_base, r_base, n, length, k_token, r_token,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = n + tl.arange(0, N)
    k = load_rows(k_base, key.to(tl.int64) * k_token, key < length, D, DP, MASKED)
    rope = load_rows(r_base, key.to(tl.int64) * r_token, key < length, DR, DRP, MASKED)
    return dot(q_rope, tl.trans(rope), dot(q_nope, tl.trans(k), None))


@triton.jit
def _values(v_base, n, length, k_token, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    key = n + tl.arange(0, N)
    return load_rows(v_base, key.to(tl.int64) * k_token, key < length, V, VP, MASKED)


@triton.jit
def _own(
    q_nope, q_rope, expanded, ropes, out, lse, tiles, bases, firsts, cu_lengths, starts, lengths, scale,
    nope_token, nope_head, rope_token, rope_head, k_token, r_token,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr, PREFIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Program (head, tile) over expanded [L, H, D + V] and ropes [L, DR], see `Expansion`; out [T, H, V] dense.

    PREFIX: out and `lse` [T, H] hold what came of the positions that are not expanded.
    """
    h, tile = tl.program_id(0), tl.program_id(1)
    s = tl.load(tiles + 2 * tile)
    if s < 0:
        return
    block = tl.load(tiles + 2 * tile + 1)
    length, base = tl.load(lengths + s), tl.load(bases + s).to(tl.int64)
    lead = tl.load(starts + s) - tl.load(firsts + s)  # expanded keys before the range
    i = block * M + tl.arange(0, M)
    live, token = i < length, tl.load(cu_lengths + s).to(tl.int64) + i
    x = load_rows(q_nope, token * nope_token + h * nope_head, live, D, DP, True)
    y = load_rows(q_rope, token * rope_token + h * rope_head, live, DR, DRP, True)
    k_base, r_base = expanded + base * k_token + h * (D + V), ropes + base * r_token
    m, total, acc = tl.full([M], NEVER, tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, VP], tl.float32)
    if PREFIX:
        sums = tl.load(lse + token * H + h, mask=live, other=float("-inf"))
        m, total = tl.maximum(sums, NEVER), tl.where(sums > NEVER, 1.0, 0.0)
        acc += load_rows(out, (token * H + h) * V, live, V, VP, True).to(tl.float32)
    seen_by_all = (lead + block * M + 1) // N * N
    for n in range(0, seen_by_all, N):
        scores = _scores(x, y, k_base, r_base, n, seen_by_all, k_token, r_token, D, DP, DR, DRP, N, False)
        weights, shrink, m, total = fold(scores, scale, m, total)
        v = _values(k_base + D, n, seen_by_all, k_token, V, VP, N, False)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    for n in range(seen_by_all, lead + tl.minimum(block * M + M, length), N):
        scores = _scores(x, y, k_base, r_base, n, lead + length, k_token, r_token, D, DP, DR, DRP, N, True)
        scores = tl.where(n + tl.arange(0, N) <= (lead + i)[:, None], scores, float("-inf"))
        weights, shrink, m, total = fold(scores, scale, m, total)
        v = _values(k_base + D, n, lead + length, k_token, V, VP, N, True)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    acc, _ = normalised(acc, m, total)
    store_rows(out, (token * H + h) * V, acc, live, V, VP)


def mla_absorbed(
    q_latent: Tensor, q_rope: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    split: Tile | None = None, long: Tile | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """See `mla_absorbed_reference`. Only the last dims must be dense; R and Dr are best powers of two.

    `split`, `long` and `splits` override what the tables say.
    """
    out = result(segments, q_latent, *q_latent.shape)
    _attend(q_latent, q_rope, pool, out, segments, scale, split, long, splits)
    return out


def mla_expanded(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    own: Tile | None = None, long: Tile | None = None,
) -> Tensor:  # fmt: skip
    """See `mla_expanded_reference`. Only the last dims must be dense, best powers of two.

    Ranges of up to `SHORT` tokens are absorbed whole. `own` and `long` override what the tables say.
    """
    num_tokens, heads, nope = q_nope.shape
    dim, rank = q_rope.shape[-1], kv_b.shape[-1]
    value = kv_b.shape[1] - nope
    out = q_nope.new_empty(num_tokens, heads, value)
    if num_tokens == 0:
        return out
    rows = expansion(segments, heads * kv_b.shape[1] * q_nope.element_size())
    lse = None
    if not rows.whole:
        w_k, w_v = kv_b.split((nope, value), 1)
        q_latent = torch.einsum("thn,hnr->thr", q_nope, w_k)
        lse = q_nope.new_empty(num_tokens, heads, dtype=torch.float32)
        latent = result(segments, q_latent, *q_latent.shape)
        _attend(q_latent, q_rope, pool, latent, segments, scale, None, long, None, rows.firsts, lse)
        out = torch.einsum("thr,hvr->thv", latent, w_v).contiguous()
    if segments.max_length > SHORT:
        cached = picked(pool, rows.pages, rows.offsets).to(q_nope.dtype)
        expanded = torch.nn.functional.linear(cached[:, :rank], kv_b.flatten(0, 1))
        t = own or OWN.get(q_nope.element_size(), WIDE)
        tiles = tiles_of(segments, 1, t.m, SHORT)
        _own[(heads, len(tiles))](
            q_nope, q_rope, expanded, cached[:, rank:], out, lse, tiles, rows.bases, rows.firsts,
            segments.cu_lengths, segments.starts, segments.lengths, scale * LOG2E.value,
            *q_nope.stride()[:2], *q_rope.stride()[:2], expanded.stride(0), cached.stride(0), H=heads, D=nope,
            DP=padded(nope), DR=dim, DRP=padded(dim), V=value, VP=padded(value), PREFIX=not rows.whole, **t.launch,
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class Expansion:
    """Which positions become keys and values, L of them: their `pages` and `offsets` [L]. Those of segment s are rows
    `bases[s]` on, position `firsts[s]` to its end. `whole`: no range needs any other."""

    pages: Tensor
    offsets: Tensor
    bases: Tensor
    firsts: Tensor
    whole: bool


def expansion(segments: Segments, row_bytes: int) -> Expansion:
    """The step's own tokens; where the host knows the lengths, also what precedes a range for which that pays."""
    return segments.once(("expansion", row_bytes), lambda: _expansion(segments, row_bytes))


def _expansion(segments: Segments, row_bytes: int) -> Expansion:
    starts, lengths = segments.host_starts, segments.host_lengths
    own = (segments.write_page, segments.write_offset, segments.cu_lengths[:-1], segments.starts)
    if not segments.known or not starts.any():
        return Expansion(*own, segments.known and bool((lengths > SHORT).all()))
    long = lengths > SHORT
    firsts = np.where(lengths >= PAYS, 0, starts)
    counts = np.where(long, starts + lengths - firsts, 0)
    if counts.sum() * row_bytes > MOST_BYTES:
        return Expansion(*own, False)
    bases = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(row)) - np.repeat(bases - firsts, counts)
    columns = (row, position, bases, firsts)
    packed = upload(np.concatenate(columns).astype(np.int32), segments.device)
    row, position, bases, firsts = packed.split([len(column) for column in columns])
    pages = segments.page_table[row, position // segments.page_size]
    whole = bool((long & (segments.host_starts == 0) | (lengths >= PAYS)).all())
    return Expansion(pages, position % segments.page_size, bases, firsts, whole)


def _attend(
    q_latent: Tensor, q_rope: Tensor, pool: Tensor, out: Tensor, segments: Segments, scale: float,
    split: Tile | None, long: Tile | None, splits: int | None,
    before: Tensor | None = None, prefix_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes out [T, H, R]. With `before` [S], ranges above `SHORT` see so many keys, and `prefix_lse` is written."""
    (num_tokens, heads, rank), dim = q_latent.shape, q_rope.shape[-1]
    assert q_latent.stride(2) == q_rope.stride(2) == pool.stride(2) == 1, "a head's elements must be neighbours"
    if num_tokens == 0:
        return
    ranges = (segments.cu_lengths, segments.starts, segments.lengths, segments.page_table)
    strides = (
        *q_latent.stride()[:2], *q_rope.stride()[:2], *out.stride()[:2], *pool.stride()[:2],
        segments.page_table.stride(0),
    )  # fmt: skip
    shape = {"H": heads, "R": rank, "RP": padded(rank), "DR": dim, "DRP": padded(dim), "PAGE": segments.page_size}
    t = split or SPLIT.get(q_latent.element_size(), WIDE)
    queries = min(SHORT, segments.max_length)
    blocks = triton.cdiv(queries * heads, t.m)
    splits = splits or splits_of(segments, segments.num_segments * blocks, t.n, WAVES)
    rows = segments.num_segments * queries * heads * splits if splits > 1 else 0
    partial, lse = (q_latent.new_empty(rows * n, dtype=torch.float32) for n in (rank, 1))
    _absorbed[(segments.num_segments, blocks, splits)](
        q_latent, q_rope, pool, out, partial, lse, None, None, *ranges, scale * LOG2E.value, *strides, **shape,
        SHORT=SHORT, Q=queries, SPLITS=splits, TILED=False, PREFIX=False, **t.launch,
    )  # fmt: skip
    if splits > 1:
        launch_combine(partial, lse, out, segments, queries, SHORT, splits, t.n)
    if segments.max_length > SHORT:
        t = long or LONG.get(q_latent.element_size(), WIDE)
        tiles = tiles_of(segments, heads, t.m, SHORT)
        _absorbed[(len(tiles), 1, 1)](
            q_latent, q_rope, pool, out, None, prefix_lse, tiles, before, *ranges, scale * LOG2E.value, *strides,
            **shape, SHORT=2**30, Q=1, SPLITS=1, TILED=True, PREFIX=before is not None, **t.launch,
        )  # fmt: skip
