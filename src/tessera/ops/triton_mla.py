"""Multi-head latent attention in Triton; see `mla.py` for what the two forms compute.

Absorbed: `triton_latent.py`. Expanded: the step's own tokens become keys and values once, of a size that T bounds, and
a flash kernel runs over them; what precedes a range is attended in latent space, of whatever length it is, and is
where the flash kernel's running softmax begins. So both serve any step, and in a graph. Where the host knows the
lengths, what precedes a long range is expanded too.

M rows of a tile, N keys of a tile, H heads, R latent rank, Dr rope dim, L expanded positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.triton_common import LOG2E, dot
from tessera.ops.triton_latent import RANGES, SHORT, LatentTiles, attend_latents
from tessera.ops.triton_softmax import NEVER, fold, load_rows, normalised, padded, store_rows
from tessera.ops.triton_tiles import Tile, tiles_of
from tessera.ops.upload import upload_columns

PAYS = 192  # tokens of a range from which on expanding what precedes it costs less than attending it in latent space:
# expanding takes 2 R (N + V) operations a head and position, attending in latent space 2 (2 R - N - V) more a query
MOST_BYTES = 1 << 30  # of gathered latents with their keys and values; past that, only those of the step's own tokens

GATHERED = 4  # rows that a program brings together

# By element size, from one H100; `bench/kernels.py attention --sweep` tries others.
OWN = {2: Tile(128, 64, 8, 3)}
WIDE = Tile(16, 16, 4, 2)  # fp32, on the plain units


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["pages", "offsets"])
def _gather(
    pool, out, pages, offsets, num_rows, page_stride, token_stride, W: tl.constexpr, WP: tl.constexpr, B: tl.constexpr
):
    """Program (B rows): rows of W from their places in the pool to out [L, W]."""
    row = tl.program_id(0) * B + tl.arange(0, B)
    live = row < num_rows
    page = tl.load(pages + row, mask=live, other=0).to(tl.int64)
    at = page * page_stride + tl.load(offsets + row, mask=live, other=0).to(tl.int64) * token_stride
    store_rows(out, row.to(tl.int64) * W, load_rows(pool, at, live, W, WP, True), live, W, WP)


@triton.jit
def _keys(
    k_base, r_base, n, length, k_token, r_token,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, DRP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = n + tl.arange(0, N)
    k = load_rows(k_base, key.to(tl.int64) * k_token, key < length, D, DP, MASKED)
    return k, load_rows(r_base, key.to(tl.int64) * r_token, key < length, DR, DRP, MASKED)


@triton.jit
def _scores(q_nope, q_rope, k, rope):
    return dot(q_rope, tl.trans(rope), dot(q_nope, tl.trans(k), None))


@triton.jit
def _values(v_base, n, length, k_token, V: tl.constexpr, VP: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    key = n + tl.arange(0, N)
    return load_rows(v_base, key.to(tl.int64) * k_token, key < length, V, VP, MASKED)


@triton.jit(do_not_specialize_on_alignment=[*RANGES, "bases", "firsts"])
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
        k, rope = _keys(k_base, r_base, n, seen_by_all, k_token, r_token, D, DP, DR, DRP, N, False)
        weights, shrink, m, total = fold(_scores(x, y, k, rope), scale, m, total)
        v = _values(k_base + D, n, seen_by_all, k_token, V, VP, N, False)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    for n in range(seen_by_all, lead + tl.minimum(block * M + M, length), N):
        k, rope = _keys(k_base, r_base, n, lead + length, k_token, r_token, D, DP, DR, DRP, N, True)
        scores = _scores(x, y, k, rope)
        scores = tl.where(n + tl.arange(0, N) <= (lead + i)[:, None], scores, float("-inf"))
        weights, shrink, m, total = fold(scores, scale, m, total)
        v = _values(k_base + D, n, lead + length, k_token, V, VP, N, True)
        acc = dot(weights.to(v.dtype), v, acc * shrink[:, None])
    acc, _ = normalised(acc, m, total)
    store_rows(out, (token * H + h) * V, acc, live, V, VP)


def mla_absorbed(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    tiles: LatentTiles | None = None, splits: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """See `mla_absorbed_reference`. Only the last dims must be dense; R and Dr are best powers of two.

    For `tiles` and `splits` see `attend_latents`.
    """
    return attend_latents(q_nope, q_rope, kv_b, pool, segments, scale, tiles=tiles, splits=splits)[0]


def mla_expanded(
    q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float, *,
    own: Tile | None = None, tiles: LatentTiles | None = None,
) -> Tensor:  # fmt: skip
    """See `mla_expanded_reference`. Only the last dims must be dense, best powers of two.

    Ranges of up to `SHORT` tokens are absorbed whole. `own` and `tiles` override what the tables say.
    """
    num_tokens, heads, nope = q_nope.shape
    dim, rank = q_rope.shape[-1], kv_b.shape[-1]
    value = kv_b.shape[1] - nope
    rows = expansion(segments, (heads * kv_b.shape[1] + pool.shape[2]) * q_nope.element_size())
    if rows.whole or num_tokens == 0:
        out, lse = q_nope.new_empty(num_tokens, heads, value), None
    else:
        out, lse = attend_latents(q_nope, q_rope, kv_b, pool, segments, scale, tiles=tiles, before=rows.firsts)
    if segments.max_length > SHORT and num_tokens:
        cached = _gathered(pool, rows, q_nope.dtype)
        expanded = torch.nn.functional.linear(cached[:, :rank], kv_b.flatten(0, 1))
        t = own or OWN.get(q_nope.element_size(), WIDE)
        blocks, ropes = tiles_of(segments, 1, t.m, SHORT), cached[:, rank:]
        _own[(heads, len(blocks))](
            q_nope, q_rope, expanded, ropes, out, lse, blocks, rows.bases, rows.firsts,
            segments.cu_lengths, segments.starts, segments.lengths, scale * LOG2E.value,
            *q_nope.stride()[:2], *q_rope.stride()[:2], expanded.stride(0), cached.stride(0), H=heads, D=nope,
            DP=padded(nope), DR=dim, DRP=padded(dim), V=value, VP=padded(value), PREFIX=not rows.whole,
            **t.launch,
        )  # fmt: skip
    return out


def _gathered(pool: Tensor, rows: Expansion, dtype: torch.dtype) -> Tensor:
    """[L, R + Dr] in `dtype`."""
    num, width = len(rows.pages), pool.shape[2]
    out = torch.empty(num, width, dtype=dtype, device=pool.device)
    _gather[(triton.cdiv(num, GATHERED),)](
        pool, out, rows.pages, rows.offsets, num, *pool.stride()[:2], W=width, WP=triton.next_power_of_2(width),
        B=GATHERED,
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
    row, position, bases, firsts = upload_columns((row, position, bases, firsts), segments.device)
    pages = segments.page_table[row, position // segments.page_size]
    whole = bool((long & (segments.host_starts == 0) | (lengths >= PAYS)).all())
    return Expansion(pages, position % segments.page_size, bases, firsts, whole)
