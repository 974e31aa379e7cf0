"""Attention and cache writes as `kernels.py` times them: decode, verify and prefill of three shapes, bf16."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_case import Case, distance, random
from tessera.core.spec import RopeSpec
from tessera.ops import triton_attention, triton_cache, triton_latent, triton_mla
from tessera.ops.attention import paged_attention_reference
from tessera.ops.backend import Backend, backend
from tessera.ops.fused import HeadInputs, LatentInputs, write_heads, write_latents
from tessera.ops.mla import mla_absorbed_reference, mla_expanded_reference
from tessera.ops.rope import rope_tables
from tessera.ops.segments import Segments, make_segments
from tessera.ops.triton_tiles import Tile

HEADS = {"qwen3-8b": (32, 8, 128), "qwen3next": (16, 2, 256)}
RANGES = [
    *(("decode", (num, 1023, 1)) for num in (1, 16, 64, 512)), ("verify", (64, 1020, 4)),
    ("prefill", (4, 0, 4096)), ("chunks", (4, 3072, 1024)),
]  # fmt: skip
DECODES = [
    Tile(16, 64, 2, 3), Tile(16, 64, 4, 3), Tile(16, 32, 2, 3), Tile(16, 32, 4, 3), Tile(16, 32, 4, 4),
    Tile(16, 128, 4, 2),
]  # fmt: skip
FLASH = {
    128: [
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 3),
        Tile(128, 64, 4, 2),
        Tile(128, 32, 4, 3),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 3),
    ],
    256: [Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2)],
}
LATENTS = [
    replace(triton_latent.TILES[2], short=Tile(16, *short), split=Tile(16, *short))
    for short in ((16, 4, 3), (32, 4, 2), (32, 4, 3), (32, 4, 4), (64, 8, 3), (64, 4, 3))
]
MIXED = [
    replace(triton_latent.TILES[2], short=Tile(16, *short))
    for short in ((64, 4, 3), (32, 4, 3), (32, 4, 2), (64, 2, 2))
] + [replace(triton_latent.TILES[2], long=Tile(64, 32, 8, 3))]
JOINS = [
    *(Tile(16, n, warps, stages) for n, warps, stages in ((32, 4, 3), (64, 8, 2))),
    *(Tile(32, n, 8, stages) for n, stages in ((64, 2), (32, 3), (32, 2))), Tile(64, 32, 8, 2),
]  # fmt: skip
MLA_OWN = [
    Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(128, 32, 4, 2), Tile(128, 32, 4, 3), Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 3), Tile(256, 64, 16, 2),
]  # fmt: skip
MIXED_SPLITS = [(short, long) for short in (2, 3, 4, 8) for long in (1, 2, 3)]
RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128
LATENT_SCALE = (NOPE + ROPE) ** -0.5
LIBRARY: list[dict[str, Any]] = [{"by": "flashinfer"}] if importlib.util.find_spec("flashinfer") else []


@cache
def library(name: str) -> Backend:
    """The backend of a library: planned when it is first run, so that graphs hold its launches only."""
    return backend(name)


def segments_of(num: int, start: int, length: int, page_size: int) -> tuple[Segments, int]:
    """Equal ranges over scattered pages, and how many pages there are."""
    each = -(-(start + length) // page_size)
    pages = np.random.default_rng(0).permutation(np.arange(1, num * each + 1)).reshape(num, each)
    starts, lengths = np.full(num, start), np.full(num, length)
    return make_segments(starts, lengths, pages, np.zeros(num), page_size, "cuda"), num * each + 1


def attention(name: str, shape: str, num: int, start: int, length: int, page_size: int) -> Case:
    """Paged attention of equal ranges."""
    num_q, num_kv, dim = HEADS[shape]
    segments, num_pages = segments_of(num, start, length, page_size)
    scale, group = dim**-0.5, num_q // num_kv

    def make() -> Any:
        return random(num * length, num_q, dim), random(num_pages, 2, num_kv, page_size, dim)

    def run(inputs: Any, by: str = "", **options: Any) -> Tensor:
        op = library(by).paged_attention if by else triton_attention.paged_attention
        return op(*inputs, segments, scale, **options)

    def check(inputs: Any, found: Tensor) -> float:
        """One key head of the last range."""
        q, pool = inputs
        last, tokens = segments.part(num - 1, num), segments.tokens_of(num - 1, num)
        expected = paged_attention_reference(q[tokens, -group:].float(), pool[:, :, -1:].float(), last, scale)
        return distance(found[tokens, -group:], expected)

    pairs = num * length * (start + (length + 1) / 2)
    tiles = {"decode": DECODES} if length <= triton_attention.SHORT else {"prefill": FLASH[dim]}
    variants: list[dict[str, Any]] = [{kind: tile} for kind, choice in tiles.items() for tile in choice]
    if length == 1 and num < 512:
        variants += [{"splits": n} for n in ((4, 8, 16) if num == 1 else (1, 2, 4, 6, 8))]
    variants += LIBRARY
    moved = 2 * num_kv * dim * 2 * num * (start + length) + 4 * num * length * num_q * dim
    size = num_pages * page_size * 2 * num_kv * dim * 2
    return Case(name, moved, 4 * pairs * num_q * dim, size, make, run, check, variants)


def latent(name: str, num: int, start: int, length: int, page_size: int, heads: int = 16) -> Case:
    """MLA of equal ranges: absorbed when they are short, expanded when they are long. Products with `kv_b` included."""
    segments, num_pages = segments_of(num, start, length, page_size)
    absorbed = length <= triton_latent.SHORT
    kv_b = random(heads, NOPE + VALUE, RANK) * RANK**-0.5

    def make() -> Any:
        return latent_inputs(num * length, heads, num_pages, page_size)

    def run(inputs: Any, by: str = "", **options: Any) -> Tensor:
        (q, rope, pool), ops = inputs, library(by) if by else triton_mla
        form = ops.mla_absorbed if absorbed else ops.mla_expanded
        return form(q, rope, kv_b, pool, segments, LATENT_SCALE, **options)

    def check(inputs: Any, found: Tensor) -> float:
        """One head of the last range."""
        q, rope, pool = (x.float() for x in inputs)
        last, tokens = segments.part(num - 1, num), segments.tokens_of(num - 1, num)
        plain = mla_absorbed_reference if absorbed else mla_expanded_reference
        expected = plain(q[tokens, -1:], rope[tokens, -1:], kv_b[-1:].float(), pool, last, LATENT_SCALE)
        return distance(found[tokens, -1:], expected)

    pairs = num * length * (start + (length + 1) / 2)
    work = 2 * heads * pairs * ((2 * RANK + ROPE) if absorbed else (NOPE + ROPE + VALUE))
    moved = 2 * num * ((start + length) * (RANK + ROPE) + length * heads * (NOPE + ROPE + VALUE)) + 2 * kv_b.numel()
    if absorbed:
        variants: list[dict[str, Any]] = [{"tiles": tiles} for tiles in LATENTS]
        variants += [{"splits": (n, 1)} for n in ((8, 16, 32) if num == 1 else (1, 2, 3, 4, 8))] if num < 512 else []
    else:
        variants = [{"own": tile} for tile in MLA_OWN]
    size = num_pages * page_size * 2 * (RANK + ROPE)
    return Case(name, moved, work, size, make, run, check, variants + LIBRARY)


def latent_inputs(num_tokens: int, heads: int, num_pages: int, page_size: int) -> tuple[Tensor, ...]:
    """Queries, their roped part, and a pool of latents."""
    queries = (random(num_tokens, heads, width) for width in (NOPE, ROPE))
    return *queries, random(num_pages, page_size, RANK + ROPE)


def latent_mixed(name: str, decodes: int, start: int, length: int, heads: int = 16) -> Case:
    """MLA of a chunk among decodes of 512 to 640 tokens, as a graph of a padded size sees them: no host numbers."""
    starts = np.append(start, np.random.default_rng(0).integers(511, 640, decodes))
    lengths = np.append(length, np.ones(decodes, np.int64))
    each = -(-(starts + lengths) // 64)
    num_pages = int(each.sum()) + 1
    table = np.zeros((decodes + 1, 64), np.int64)  # as wide as the longest sequence that may come
    for row, (first, count) in enumerate(zip(np.cumsum(each) - each, each, strict=True)):
        table[row, :count] = 1 + np.random.default_rng(1).permutation(num_pages - 1)[first : first + count]
    known = make_segments(starts, lengths, table, np.zeros(decodes + 1), 64, "cuda")
    real = known.num_tokens
    segments = padded(replace(known, page_table=torch.from_numpy(table.astype(np.int32)).cuda()))
    kv_b = random(heads, NOPE + VALUE, RANK) * RANK**-0.5

    def make() -> Any:
        return latent_inputs(segments.num_tokens, heads, num_pages, 64)

    def run(inputs: Any, form: str = "absorbed", **options: Any) -> Tensor:
        q, rope, pool = inputs
        attend = {"absorbed": triton_mla.mla_absorbed, "expanded": triton_mla.mla_expanded}[form]
        return attend(q, rope, kv_b, pool, segments, LATENT_SCALE, **options)

    def check(inputs: Any, found: Tensor) -> float:
        """One head of every token."""
        q, rope, pool = (x.float() for x in inputs)
        plain = mla_absorbed_reference(q[:real, -1:], rope[:real, -1:], kv_b[-1:].float(), pool, known, LATENT_SCALE)
        return max(distance(found[:real, -1:], plain), found[real:].abs().max().item() if real < len(found) else 0)

    keys, pairs = int((starts + lengths).sum()), length * (start + (length + 1) / 2)
    work = 2 * heads * (pairs * (NOPE + ROPE + VALUE) + RANK * (NOPE + VALUE) * (start + length))
    work += 2 * heads * (2 * RANK + ROPE) * int((starts + lengths)[1:].sum())
    moved = 2 * (keys * (RANK + ROPE) + real * heads * (NOPE + ROPE + VALUE) + kv_b.numel())
    variants: list[dict[str, Any]] = [{"form": "expanded"}]
    variants += [{"tiles": tiles} for tiles in MIXED] + [{"splits": n} for n in MIXED_SPLITS]
    variants += [{"tiles": replace(triton_latent.TILES[2], join=join)} for join in JOINS]
    return Case(name, moved, work, num_pages * 128 * (RANK + ROPE), make, run, check, variants)


def padded(known: Segments) -> Segments:
    """The same step without host numbers, S padded to a power of two and T to a multiple of 64, as graphs are."""
    more = (1 << known.num_segments.bit_length()) - known.num_segments
    tokens = -known.num_tokens % 64
    pad = torch.nn.functional.pad
    last = pad(known.cu_lengths[1:], (0, more), value=known.num_tokens)
    none = np.zeros(0, np.int32)
    return replace(
        known, cu_lengths=torch.cat((known.cu_lengths[:1], last)), starts=pad(known.starts, (0, more)),
        lengths=pad(known.lengths, (0, more)), slots=pad(known.slots, (0, more)),
        page_table=pad(known.page_table, (0, 0, 0, more)), positions=pad(known.positions, (0, tokens)),
        rows=pad(known.rows, (0, tokens), value=known.num_segments + more - 1),
        write_page=pad(known.write_page, (0, tokens)), write_offset=pad(known.write_offset, (0, tokens)),
        host_starts=none, host_lengths=none, max_length=known.num_tokens + tokens, _made={},
    )  # fmt: skip


def head_writes(name: str, shape: str, num: int, length: int) -> Case:
    """Norm, rope and cache write of queries, keys and values."""
    (num_q, num_kv, dim), page_size = HEADS[shape], 64
    segments, num_pages = segments_of(num, 0, length, page_size)
    ends = np.cumsum([num_q * dim, num_kv * dim, num_kv * dim]).tolist()
    cut = (slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2]))
    tables = rope_tables(RopeSpec(dim if dim == 128 else dim // 4, 1e6), 8192, device="cuda")
    inputs = HeadInputs(*cut, dim, tables, False, random(dim), random(dim), 1e-6, False)
    tokens = num * length
    pool = random(num_pages, 2, num_kv, page_size, dim)

    def make() -> Any:
        return random(tokens, ends[2])

    def check(y: Tensor, found: Tensor) -> float:
        plain, fast = torch.zeros_like(pool), torch.zeros_like(pool)
        q = write_heads(y, inputs, plain, segments)
        triton_cache.write_heads(y, inputs, fast, segments)
        return max(distance(found, q), distance(fast, plain))

    def run(y: Tensor) -> Tensor:
        return triton_cache.write_heads(y, inputs, pool, segments)

    return Case(name, 4 * tokens * ends[2], 0, 2 * tokens * ends[2], make, run, check)


def latent_writes(name: str, num: int, length: int, heads: int = 16) -> Case:
    """Norm, rope and cache write of a latent, and rope of its queries."""
    segments, num_pages = segments_of(num, 0, length, 64)
    tables = rope_tables(RopeSpec(ROPE, 1e6), 8192, device="cuda")
    inputs = LatentInputs(slice(0, RANK + ROPE), tables, True, random(RANK), 1e-6)
    tokens, pool = num * length, random(num_pages, 64, RANK + ROPE)

    def make() -> Any:
        return random(tokens, RANK + ROPE), random(tokens, heads, NOPE + ROPE)

    def check(both: Any, found: Tensor) -> float:
        plain, fast = torch.zeros_like(pool), torch.zeros_like(pool)
        q = write_latents(*both, inputs, plain, segments)
        triton_cache.write_latents(*both, inputs, fast, segments)
        return max(distance(found, q), distance(fast, plain))

    def run(both: Any) -> Tensor:
        return triton_cache.write_latents(*both, inputs, pool, segments)

    size = 2 * tokens * (RANK + ROPE + heads * (NOPE + ROPE))
    return Case(name, 4 * tokens * (RANK + ROPE + heads * ROPE), 0, size, make, run, check)


def fp8(name: str, *sizes: Any) -> Case:
    """Attention over a pool in fp8: keys and values are half the bytes."""
    case = attention(name, *sizes)

    def make() -> Any:
        q, pool = case.make()
        return q, pool.to(torch.float8_e4m3fn)

    def check(inputs: Any, found: Tensor) -> float:
        return distance(found, case.run((inputs[0], inputs[1].to(torch.bfloat16))))

    return replace(case, num_bytes=case.num_bytes / 2, set_bytes=case.set_bytes // 2, make=make, check=check)


def cases() -> dict[str, Callable[[str], Case]]:
    """What makes each case from its name."""
    makers: dict[str, Callable[[str], Case]] = {}

    def add(name: str, make: Callable[..., Case], *sizes: Any) -> None:
        makers[name] = lambda name: make(name, *sizes)

    for (kind, (num, start, length)), page_size in product(RANGES, (16, 64)):
        what = f"{kind} {num}x{start + length} page {page_size}"
        for shape in HEADS:
            add(f"{shape} {what}", attention, shape, num, start, length, page_size)
        add(f"mla {what}", latent, num, start, length, page_size)
    for num, length in ((64, 1), (512, 1), (4, 4096)):
        for shape in HEADS:
            add(f"{shape} write_heads {num}x{length}", head_writes, shape, num, length)
        add(f"mla write_latents {num}x{length}", latent_writes, num, length)
    for sizes in ((60, 512, 190), (60, 0, 190), (28, 1024, 480), (60, 512, 900)):
        add("latent mixed {} decodes, {}+{}".format(*sizes), latent_mixed, *sizes)
    add("mla decode 64x1024 page 64, 128 heads", latent, 64, 1023, 1, 64, 128)
    add("qwen3-8b decode 64x1024 page 64, fp8", fp8, "qwen3-8b", 64, 1023, 1, 64)
    return makers
