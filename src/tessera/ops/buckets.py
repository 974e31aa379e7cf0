"""How the ranges of a step are grouped for attention in plain torch: few calls, bounded padding.

Every range becomes blocks of at most `fold / group` tokens. Blocks of few tokens (decode, verification) of equal size
and similar length share a call; a longer one has a call of its own, whose keys end where it ends. Made once per step,
used by all layers. B blocks, n tokens of a block, L positions, G query heads of a key head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.ops.narrow import movable
from tessera.ops.products import attend_by_products, products_pay
from tessera.ops.segments import Segments
from tessera.ops.upload import upload

FOLD = 1024  # queries of a call per key head: enough for large tiles, and the mask stays small
BATCHED = 16  # blocks of up to this many tokens share calls
SLACK = 64  # positions, and
WASTE = 1.25  # the factor, by which the shortest block of a call may be padded
GATHERED = 1 << 22  # elements that a call gathers: 8 MB of bfloat16 stay in cache between gather and product


@dataclass(frozen=True, slots=True)
class Shape:
    """What a pool and its queries look like. A page holds `planes` (keys, values) of `heads` lines, token by token."""

    planes: int
    heads: int
    group: int
    dim: int
    dtype: torch.dtype  # of the queries


@dataclass(frozen=True, slots=True)
class Bucket:
    """Blocks that share a call. `tokens`: their rows of the step, B * n of them.

    `lines`: which lines of the pool are gathered, in the order [planes, B, heads, P]. `length`: L, how many positions
    of them are attended to; all where `products`, not flash, attend. `mask` [B or 1, 1, G * n, L] is 0 or -inf,
    None where every query sees all L positions. Past `end`, and in the gathered rows `stale` [planes, B, heads,
    P * token], a page holds nothing of its block; whatever is there must not be read, not even times zero.
    """

    tokens: Tensor | slice
    num_blocks: int
    size: int
    length: int
    end: int
    products: bool
    lines: Tensor
    mask: Tensor | None
    stale: Tensor | None


@dataclass(frozen=True, slots=True)
class _Block:
    segment: int
    first: int  # row of the step
    size: int
    end: int


def buckets(segments: Segments, shape: Shape) -> list[Bucket]:
    """The calls of a step; made once and kept in `segments`."""
    return segments.once(("buckets", shape), lambda: _make(segments, shape))


def gathered(pool: Tensor, shape: Shape, bucket: Bucket) -> Tensor:
    """What the pages of a bucket hold: [planes, B, heads, L, D] in the queries' dtype.

    The pool ends in (token, dim) and has no gaps (`view` fails on one that has): one copy puts all in place.
    """
    token, dim = pool.shape[-2:]
    rows = movable(pool).view(-1, token * dim).index_select(0, bucket.lines).view(-1, dim)
    if bucket.stale is not None:
        rows.index_fill_(0, bucket.stale, 0)
    rows = rows.view(shape.planes, bucket.num_blocks, shape.heads, -1, dim)[..., : bucket.length, :]
    if bucket.length > bucket.end:
        rows[..., bucket.end :, :] = 0
    return rows.view(pool.dtype).to(shape.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float, out: Tensor) -> None:
    """Writes the bucket's rows of out [T, heads * G, D]: q [T, heads * G, D] over k, v [B, heads, L, D].

    The query heads of a key head are folded into the query length: one flash call without repeated keys.
    """
    heads, dim = k.shape[1], q.shape[-1]
    own = q[bucket.tokens].view(bucket.num_blocks, bucket.size, heads, -1, dim)
    folded = own.permute(0, 2, 3, 1, 4).flatten(2, 3)
    if bucket.products:
        o = attend_by_products(folded, k, v, bucket.mask, scale)
    else:
        o = torch.nn.functional.scaled_dot_product_attention(folded, k, v, attn_mask=bucket.mask, scale=scale)
    o = (
        o.unflatten(2, (-1, bucket.size))
        .permute(0, 3, 1, 2, 4)
        .reshape(-1, heads * folded.shape[2] // bucket.size, dim)
    )
    out[bucket.tokens] = o[..., : out.shape[-1]]


def _make(segments: Segments, shape: Shape) -> list[Bucket]:
    blocks = _blocks(segments, max(FOLD // shape.group, 1))
    long = [b for b in blocks if b.size > BATCHED]
    triangles = {
        size: _right_aligned(size, max(b.end for b in long), shape, segments.device) for size in {b.size for b in long}
    }
    made = [_single(segments, b, triangles[b.size], shape) for b in long]
    short = sorted((b for b in blocks if b.size <= BATCHED), key=lambda b: (b.size, -b.end))
    width = shape.planes * shape.heads * shape.dim
    at = 0
    while at < len(short):
        last = at + 1
        while last < len(short) and _fits(short[at], short[last], last - at + 1, width):
            last += 1
        made.append(_batch(segments, short[at:last], shape))
        at = last
    return made


def _blocks(segments: Segments, block: int) -> list[_Block]:
    made, row = [], 0
    for s, (start, length) in enumerate(
        zip(segments.host_starts.tolist(), segments.host_lengths.tolist(), strict=True)
    ):
        for offset in range(0, length, block):
            size = min(block, length - offset)
            made.append(_Block(s, row + offset, size, start + offset + size))
        row += length
    return made


def _fits(longest: _Block, candidate: _Block, count: int, width: int) -> bool:
    """Whether a call that begins with `longest` may also hold `candidate` as its block number `count`."""
    return (
        candidate.size == longest.size
        and longest.end <= max(candidate.end * WASTE, candidate.end + SLACK)
        and count * longest.end * width <= GATHERED
    )


def _right_aligned(size: int, length: int, shape: Shape, device: torch.device) -> Tensor:
    """[G * n, L] causal mask whose last column is the last query's own position: its tail serves any shorter L."""
    mask = torch.full((size, length), float("-inf"), dtype=shape.dtype, device=device).triu(length - size + 1)
    return mask.repeat(shape.group, 1)


def _lines(segments: Segments, of_blocks: slice | Tensor, length: int, shape: Shape) -> Tensor:
    """[planes, B, heads, P], flat: line `page * planes * heads + plane * heads + head`."""
    pages = segments.page_table[of_blocks, : -(-length // segments.page_size)].long()
    line = torch.arange(shape.planes * shape.heads, device=pages.device).view(shape.planes, 1, shape.heads, 1)
    return (pages[None, :, None] * line.numel() + line).flatten()


def _single(segments: Segments, b: _Block, triangle: Tensor, shape: Shape) -> Bucket:
    lines = _lines(segments, slice(b.segment, b.segment + 1), b.end, shape)
    mask = triangle[None, None, :, triangle.shape[1] - b.end :]
    if mask.device.type != "cpu":
        mask = mask.contiguous()  # kernels want its first element aligned
    return Bucket(slice(b.first, b.first + b.size), 1, b.size, b.end, b.end, False, lines, mask, None)


def _batch(segments: Segments, members: list[_Block], shape: Shape) -> Bucket:
    """One call for blocks of equal size, longest first."""
    device, size, end = segments.device, members[0].size, members[0].end
    taken = -(-end // segments.page_size) * segments.page_size
    products = products_pay(device, shape.dtype, len(members) * shape.heads * taken * shape.dim)
    length = taken if products else end
    members = sorted(members, key=lambda b: b.first)
    ends = np.array([b.end for b in members])
    rows = (np.array([b.first for b in members])[:, None] + np.arange(size)).ravel()
    adjoining = bool((np.diff(rows) == 1).all())
    tokens = slice(int(rows[0]), int(rows[-1]) + 1) if adjoining else upload(rows, device)
    lines = _lines(segments, upload(np.array([b.segment for b in members]), device), end, shape)
    at = np.arange(length)
    mask = stale = None
    if size > 1 or (ends != length).any():
        own = (ends[:, None] - size + np.arange(size))[:, :, None]  # position of each query
        hidden = upload(np.tile(at > own, (1, shape.group, 1)), device)
        dtype = torch.float32 if products else shape.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, None]
    if (ends != end).any():
        block, position = np.nonzero(at[:end] >= ends[:, None])
        plane = np.arange(shape.planes)[:, None, None] * len(members)
        row = ((plane + block) * shape.heads + np.arange(shape.heads)[:, None]) * taken + position
        stale = upload(row.ravel(), device)
    return Bucket(tokens, len(members), size, length, end, products, lines, mask, stale)
