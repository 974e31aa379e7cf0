"""Norm, rope and cache write of a step's tokens as one kernel each; the plain twins are in `fused.py`.

A program takes one token and a block of heads, in fp32 from the projection to the cache: nothing is rounded between.
T tokens, H heads, D head dim, R latent rank, Dr rope dim; B, BQ, BK heads of a block; P, DP, RP: padded widths.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fused import HeadInputs, LatentInputs
from tessera.ops.rope import RopeTables
from tessera.ops.segments import Segments
from tessera.ops.triton_common import chained, follow

BLOCK = 8  # heads of a program at most: with D = 128, eight elements a thread


@triton.jit
def narrowed(x, to):
    """x as `to` holds it; see `narrow.narrowed`. NaN stays NaN."""
    if to.dtype.element_ty == tl.float8e4nv:
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    elif to.dtype.element_ty == tl.float8e5:
        x = tl.where(x > 57344.0, 57344.0, tl.where(x < -57344.0, -57344.0, x))
    return x.to(to.dtype.element_ty)


@triton.jit
def _columns(half, P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """[P] where the first and the second of each pair lie."""
    i = tl.arange(0, P)
    if INTERLEAVED:
        return 2 * i, 2 * i + 1
    else:
        return i, half + i


@triton.jit
def _angles(cos, sin, position, half, P: tl.constexpr):
    """[P] cos and sin of a position. Loaded before any sum, like all else: loads behind one would wait for it."""
    i = tl.arange(0, P)
    c = tl.load(cos + position * half + i, mask=i < half, other=1.0)
    return c, tl.load(sin + position * half + i, mask=i < half, other=0.0)


@triton.jit
def _rotated(a, b, c, s):
    """Pairs [B, P] turned by angles [P]."""
    return a * c - b * s, b * c + a * s


@triton.jit
def _weight(norm, at, mask, ZERO_CENTRED: tl.constexpr):
    w = tl.load(norm + at, mask=mask, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        w += 1.0
    return w


@triton.jit
def _normed_rotated(
    x, norm, to, head, cos, sin, position, eps, to_head,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    """Heads of x [HEADS, D], normed and their first 2 * HALF dims rotated, to `to` with a head stride of its own."""
    live, i = (head < HEADS)[:, None], tl.arange(0, P)
    first, second = _columns(HALF, P, INTERLEAVED)
    inside, at = live & (i < HALF), head[:, None] * D
    a = tl.load(x + at + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + second, mask=inside, other=0.0).to(tl.float32)
    c, s = _angles(cos, sin, position, HALF, P)
    if NORM:
        w_first = _weight(norm, first, i < HALF, ZERO_CENTRED)
        w_second = _weight(norm, second, i < HALF, ZERO_CENTRED)
    squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
    if 2 * HALF < D:  # whole rows, although of some of it only the squares are used: wide loads
        dims = tl.arange(0, DP)
        outside = (dims >= 2 * HALF) & (dims < D)
        rest = tl.load(x + at + dims, mask=live & (dims < D), other=0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(rest * rest, 1)
            rest *= tl.rsqrt(squares / D + eps)[:, None] * _weight(norm, dims, dims < D, ZERO_CENTRED)
        tl.store(to + head[:, None] * to_head + dims, narrowed(rest, to), mask=live & outside)
    if NORM:
        factor = tl.rsqrt(squares / D + eps)[:, None]
        a *= factor * w_first
        b *= factor * w_second
    a, b = _rotated(a, b, c, s)
    at = head[:, None] * to_head
    tl.store(to + at + first, narrowed(a, to), mask=inside)
    tl.store(to + at + second, narrowed(b, to), mask=inside)


@triton.jit
def _write_heads(
    y, q_norm, k_norm, q_out, pool, cos, sin, positions, write_page, write_offset, eps,
    q_column, k_column, v_column, y_row, page_stride, plane_stride, head_stride, token_stride,
    HQ: tl.constexpr, HK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HALF: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): first the blocks of BQ queries, then of BK keys, then of values."""
    follow()
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t).to(tl.int64)
    row = y + t * y_row
    q_blocks: tl.constexpr = (HQ + BQ - 1) // BQ
    k_blocks: tl.constexpr = (HK + BK - 1) // BK
    if block < q_blocks:
        _normed_rotated(
            row + q_column, q_norm, q_out + t * HQ * D, block * BQ + tl.arange(0, BQ), cos, sin, position, eps, D,
            HQ, D, DP, HALF, P, INTERLEAVED, NORM, ZERO_CENTRED,
        )  # fmt: skip
        return
    to = pool + tl.load(write_page + t).to(tl.int64) * page_stride + tl.load(write_offset + t) * token_stride
    if block < q_blocks + k_blocks:
        _normed_rotated(
            row + k_column, k_norm, to, (block - q_blocks) * BK + tl.arange(0, BK), cos, sin, position, eps,
            head_stride, HK, D, DP, HALF, P, INTERLEAVED, NORM, ZERO_CENTRED,
        )  # fmt: skip
    else:
        head, dims = (block - q_blocks - k_blocks) * BK + tl.arange(0, BK), tl.arange(0, DP)
        live = (head < HK)[:, None] & (dims < D)
        v = tl.load(row + v_column + head[:, None] * D + dims, mask=live, other=0.0)
        tl.store(to + plane_stride + head[:, None] * head_stride + dims, narrowed(v, pool), mask=live)


@triton.jit
def _load_pairs(x, at, inside, half, P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second of each pair, [B, P] in fp32, of rows at `at` [B]."""
    i, wide = tl.arange(0, P), tl.arange(0, 2 * P)
    if INTERLEAVED:  # neighbours in one load, and then apart
        both = tl.load(x + at[:, None] + wide, mask=inside[:, None] & (wide < 2 * half), other=0.0)
        a, b = tl.split(tl.reshape(both, [at.shape[0], P, 2]))
    else:
        live = inside[:, None] & (i < half)
        a = tl.load(x + at[:, None] + i, mask=live, other=0.0)
        b = tl.load(x + at[:, None] + half + i, mask=live, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(to, at, a, b, inside, half, P: tl.constexpr, INTERLEAVED: tl.constexpr):
    """What `_load_pairs` loads."""
    i, wide = tl.arange(0, P), tl.arange(0, 2 * P)
    if INTERLEAVED:
        both = tl.reshape(tl.join(narrowed(a, to), narrowed(b, to)), [at.shape[0], 2 * P])
        tl.store(to + at[:, None] + wide, both, mask=inside[:, None] & (wide < 2 * half))
    else:
        live = inside[:, None] & (i < half)
        tl.store(to + at[:, None] + i, narrowed(a, to), mask=live)
        tl.store(to + at[:, None] + half + i, narrowed(b, to), mask=live)


@triton.jit
def _cache_latent(
    x, norm, to, cos, sin, position, half, eps,
    R: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One token's latent and key, x [R + 2 * half], normed and rotated to `to`."""
    r, one = tl.arange(0, RP), tl.arange(0, 1)
    latent = tl.load(x + r, mask=r < R, other=0.0).to(tl.float32)
    a, b = _load_pairs(x + R, one, one == 0, half, P, INTERLEAVED)
    weight = _weight(norm, r, r < R, False)
    c, s = _angles(cos, sin, position, half, P)
    latent *= tl.rsqrt(tl.sum(latent * latent, 0) / R + eps) * weight
    tl.store(to + r, narrowed(latent, to), mask=r < R)
    a, b = _rotated(a, b, c, s)
    _store_pairs(to + R, one, a, b, one == 0, half, P, INTERLEAVED)


@triton.jit
def _write_latents(
    y, q, norm, q_out, pool, cos, sin, positions, write_page, write_offset, half, eps,
    column, y_row, q_row, q_head, page_stride, token_stride,
    H: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, RP: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): block 0 writes the cache, the others rotate queries. q begins at its Dr dims."""
    follow()
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t).to(tl.int64)
    if block == 0:
        to = pool + tl.load(write_page + t).to(tl.int64) * page_stride + tl.load(write_offset + t) * token_stride
        _cache_latent(y + t * y_row + column, norm, to, cos, sin, position, half, eps, R, P, RP, INTERLEAVED)
        return
    head = (block - 1) * B + tl.arange(0, B)
    a, b = _load_pairs(q, t * q_row + head * q_head, head < H, half, P, INTERLEAVED)
    c, s = _angles(cos, sin, position, half, P)
    a, b = _rotated(a, b, c, s)
    _store_pairs(q_out, (t * H + head) * (2 * half), a, b, head < H, half, P, INTERLEAVED)


def write_heads(y: Tensor, inputs: HeadInputs, pool: Tensor, segments: Segments) -> Tensor:
    """See `fused.write_heads`. Columns of y and dims of the pool are dense."""
    dim, half = inputs.dim, inputs.tables.dim // 2
    num_q, num_kv = inputs.num_q, inputs.num_k
    q = y.new_empty(len(y), num_q, dim)
    if len(y) == 0:
        return q
    assert y.stride(1) == pool.stride(4) == 1, "neighbours in a head must be neighbours in memory"
    b_q, b_k = (min(BLOCK, triton.next_power_of_2(heads)) for heads in (num_q, num_kv))
    _write_heads[(len(y), triton.cdiv(num_q, b_q) + 2 * triton.cdiv(num_kv, b_k))](
        y, inputs.q_norm, inputs.k_norm, q, pool, *_rope(inputs.tables, segments), inputs.eps,
        inputs.q.start, inputs.k.start, inputs.v.start, y.stride(0), *pool.stride()[:4],
        HQ=num_q, HK=num_kv, BQ=b_q, BK=b_k, D=dim, DP=triton.next_power_of_2(dim), HALF=half,
        P=triton.next_power_of_2(half), INTERLEAVED=inputs.interleaved, NORM=inputs.q_norm is not None,
        ZERO_CENTRED=inputs.zero_centred, **chained(y.device),
    )  # fmt: skip
    return q


def write_latents(y: Tensor, q: Tensor, inputs: LatentInputs, pool: Tensor, segments: Segments) -> Tensor:
    """See `fused.write_latents`. Columns of y, dims of q and of the pool are dense."""
    num_heads, dim, rank = q.shape[1], inputs.tables.dim, len(inputs.norm)
    q_rope = q.new_empty(len(q), num_heads, dim)
    if len(y) == 0:
        return q_rope
    assert y.stride(1) == q.stride(2) == pool.stride(2) == 1, "neighbours in a head must be neighbours in memory"
    b = min(2 * BLOCK, triton.next_power_of_2(num_heads))
    _write_latents[(len(y), 1 + triton.cdiv(num_heads, b))](
        y, q[..., q.shape[-1] - dim :], inputs.norm, q_rope, pool, *_rope(inputs.tables, segments), dim // 2,
        inputs.eps, inputs.kv.start, y.stride(0), *q.stride()[:2], *pool.stride()[:2], H=num_heads, R=rank, B=b,
        P=triton.next_power_of_2(dim // 2), RP=triton.next_power_of_2(rank), INTERLEAVED=inputs.interleaved,
        **chained(y.device),
    )  # fmt: skip
    return q_rope


def _rope(tables: RopeTables, segments: Segments) -> tuple[Tensor, ...]:
    """The angles by position, and where each token is and goes."""
    return tables.cos, tables.sin, segments.positions, segments.write_page, segments.write_offset
