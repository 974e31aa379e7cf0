"""Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over paged keys, and the sum of its splits.

M rows of queries, N keys of a tile, D dims. Scores are in base 2: `scale` carries log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.triton_common import chained, follow

NEVER = tl.constexpr(-1.0e30)  # the maximum of nothing: finite, so that a row that sees no key of a tile makes no NaN


@triton.jit
def pages_of(table, n, end, PAGE: tl.constexpr, N: tl.constexpr):
    """The pages of the tokens n .. n + N - 1 of a sequence: one where a tile lies in one, else [N]. The table is not
    read behind `end`; n is a multiple of N.

    Loops carry them a tile ahead: a load whose address another load of the same turn must find first cannot be under
    way several turns ahead.
    """
    if PAGE % N == 0:
        return tl.load(table + n // PAGE, mask=n < end, other=0)
    else:
        token = n + tl.arange(0, N)
        if N == 2 * PAGE:
            first = tl.load(table + n // PAGE, mask=n < end, other=0)
            second = tl.load(table + n // PAGE + 1, mask=n + PAGE < end, other=0)
            return tl.where(token < n + PAGE, first, second)
        else:
            return tl.load(table + token // PAGE, mask=token < end, other=0)


@triton.jit
def token_offsets(pages, n, page_stride, token_stride, PAGE: tl.constexpr, N: tl.constexpr):
    """[N] offsets in the pool of the tokens n .. n + N - 1 from their `pages_of`."""
    return pages.to(tl.int64) * page_stride + (n + tl.arange(0, N)) % PAGE * token_stride


@triton.jit
def load_rows(base, at, live, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """[rows, DP] from dense rows of D at offsets `at` [rows]; 0 past D and, when MASKED, where not `live` [rows]."""
    dims = tl.arange(0, DP)
    where = base + at[:, None] + dims
    if DP == D:
        if MASKED:
            return tl.load(where, mask=live[:, None], other=0.0)
        else:
            return tl.load(where)
    else:
        inside = (dims < D)[None, :]
        if MASKED:
            inside = inside & live[:, None]
        return tl.load(where, mask=inside, other=0.0)


@triton.jit
def store_rows(base, at, values, live, D: tl.constexpr, DP: tl.constexpr):
    """Writes the first D of values [rows, DP] to the live rows at offsets `at` [rows]."""
    dims = tl.arange(0, DP)
    inside = live[:, None]
    if DP != D:
        inside = inside & (dims < D)[None, :]
    tl.store(base + at[:, None] + dims, values.to(base.dtype.element_ty), mask=inside)


def padded(dim: int) -> int:
    """A width that a product of tiles can have: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def fold(scores, scale, m, total):
    """A tile of scores [M, N], -inf where hidden, to be multiplied by `scale` > 0 (in one instruction with the
    difference): its weights, what the sums so far shrink by, the new m and total."""
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return weights, shrink, m_new, total * shrink + tl.sum(weights, 1)


@triton.jit
def normalised(acc, m, total):
    """The mean of values [M, D] and log2 of the sum of exponentials [M]; 0 and -inf for a row that saw no key."""
    seen = tl.where(total > 0, total, 1.0)
    return acc / seen[:, None], tl.where(total > 0, m + tl.log2(seen), float("-inf"))


@triton.jit
def split_size(end, splits, N: tl.constexpr):
    """Keys of a split, the last one's excepted: whole tiles, and a function of the sequence's own length."""
    return tl.maximum(tl.cdiv(tl.cdiv(end, splits), N), 1) * N


@triton.jit(do_not_specialize=["queries", "splits"])
def combine(
    partial, lse, out, cu_lengths, starts, lengths, out_token, out_head, queries, splits,
    D: tl.constexpr, DP: tl.constexpr, SHORT: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (segment * queries + query, head): joins partial [S * queries, H, splits, D] and lse [S * queries, H,
    splits] into out."""
    follow()
    row, head = tl.program_id(0), tl.program_id(1)
    s, i = row // queries, row % queries
    start, length, base = tl.load(starts + s), tl.load(lengths + s), tl.load(cu_lengths + s)  # one latency, not three
    if i >= length or length > SHORT:
        return
    end = start + length
    num = tl.cdiv(end, split_size(end, splits, N))
    at = (row * tl.num_programs(1) + head).to(tl.int64) * splits
    m, total, acc = tl.full([], NEVER, tl.float32), tl.full([], 0.0, tl.float32), tl.zeros([DP], tl.float32)
    for first in range(0, num, B):
        split = first + tl.arange(0, B)
        part = tl.load(lse + at + split, mask=split < num, other=float("-inf"))
        values = load_rows(partial, (at + split) * D, split < num, D, DP, True)  # on its way while part is reduced
        m_new = tl.maximum(m, tl.max(part, 0))
        weights = tl.exp2(part - m_new)
        shrink = tl.exp2(m - m_new)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        m = m_new
    token = (base + i).to(tl.int64)
    dims = tl.arange(0, DP)
    tl.store(out + token * out_token + head * out_head + dims, (acc / total).to(out.dtype.element_ty), mask=dims < D)


def launch_combine(
    partial: Tensor, lse: Tensor, out: Tensor, segments: Segments, queries: int, short: int, splits: int, n: int
) -> None:
    """Joins the splits of the ranges of up to `short` tokens into out [T, H, D]; `queries`: rows kept of a segment."""
    combine[(segments.num_segments * queries, out.shape[1])](
        partial, lse, out, segments.cu_lengths, segments.starts, segments.lengths, out.stride(0), out.stride(1),
        queries, splits, D=out.shape[2], DP=padded(out.shape[2]), SHORT=short, N=n,
        B=min(16, triton.next_power_of_2(splits)), num_warps=max(1, padded(out.shape[2]) // 64),
        **chained(out.device),
    )  # fmt: skip
