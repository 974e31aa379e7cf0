"""Paged attention in Triton against its plain twin: interpreted at tiny sizes, on a GPU at those of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cases import BATCHES, assert_close, case, ends, for_a_graph, paged
from tessera.ops.attention import paged_attention_reference
from tessera.ops.segments import Segments
from tessera.ops.triton_attention import SHORT, paged_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [(0, 18), (33, 10), (7, SHORT), (7, SHORT + 1), (0, 1), (40, 1), (15, 1), (16, 1), (61, 3)]
RANGES = {"mixed": MIXED, "decodes": [(n, 1) for n in (0, 15, 16, 100)], "verify": [(0, 4), (61, 3), (20, 1)]}
HEADS = [(4, 2, 16), (3, 1, 24), (2, 2, 64), (2, 1, 8)]
SCALE = 0.3


def _inputs(ranges, page_size, heads, dtype, pool_dtype=None):
    num_q, num_kv, dim = heads
    c = case(ranges, page_size, device=DEVICE)
    kv = [torch.randn(end, 2, num_kv, dim, device=DEVICE).to(pool_dtype or dtype) for end in ends(c)]
    q = torch.randn(c.segments.num_tokens, num_q, dim, device=DEVICE).to(dtype)
    return c.segments, q, paged(c, 2, num_kv, tokens=kv)


def _expected(q, pool, segments: Segments, scale: float = SCALE):
    return paged_attention_reference(q.double(), pool.double(), segments, scale)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("page_size", "heads"), [(5, HEADS[0]), (64, HEADS[1]), *((16, h) for h in HEADS)], ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_is_plain(ranges, page_size, heads, splits):
    segments, q, pool = _inputs(RANGES[ranges], page_size, heads, torch.float32)
    assert_close(paged_attention(q, pool, segments, SCALE, splits=splits), _expected(q, pool, segments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    segments, q, pool = _inputs(MIXED, 16, (6, 2, 32), dtype)
    found = paged_attention(q, pool, segments, SCALE)
    assert found.dtype == dtype
    assert_close(found, _expected(q, pool, segments))


@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_pool_in_fp8(pool_dtype):
    segments, q, pool = _inputs(MIXED, 16, (4, 2, 32), torch.bfloat16, pool_dtype)
    assert_close(paged_attention(q, pool, segments, SCALE), _expected(q, pool.float(), segments))


@settings(max_examples=12)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 24)), min_size=1, max_size=5),
    heads=st.sampled_from(HEADS),
    page_size=st.sampled_from([1, 3, 16, 32]),
    splits=st.integers(1, 5),
)
def test_any_batch(ranges, heads, page_size, splits):
    segments, q, pool = _inputs(ranges, page_size, heads, torch.float32)
    assert_close(paged_attention(q, pool, segments, SCALE, splits=splits), _expected(q, pool, segments))


@pytest.mark.parametrize("ranges", RANGES)
def test_reads_nothing_of_the_batch_on_the_host(ranges):
    """As in a graph: padded, wide page tables with garbage behind a sequence's pages, host numbers unknown."""
    segments, q, pool = _inputs(RANGES[ranges], 16, (4, 2, 16), torch.float32)
    pool[0] = 0
    padded = for_a_graph(segments, pages=9, padding=3, longest=max(segments.max_length, 2))
    more = torch.cat((q, torch.randn_like(q[:5])))
    found = paged_attention(more, pool, padded, SCALE)
    assert_close(found[: len(q)], _expected(q, pool, segments))
    assert not found.isnan().any()
    assert not found[-2:].any(), "tokens of no range come out as zeros"


def test_strided():
    """Queries that lie in a wider projection, and a pool that is a layer's part of one allocation."""
    segments, q, pool = _inputs(MIXED, 16, (4, 2, 16), torch.float32)
    wide = torch.randn(len(q), 150, device=DEVICE)
    view = wide[:, 20:84].unflatten(1, (4, 16))
    view.copy_(q)
    layers = torch.full((len(pool), 3, *pool.shape[1:]), float("nan"), device=DEVICE)
    layers[:, 1] = pool
    assert_close(paged_attention(view, layers[:, 1], segments, SCALE), _expected(q, pool, segments))


@pytest.mark.parametrize("length", [1, 3, 20])
def test_a_range_is_computed_alike_in_any_company(length):
    """To the bit: how keys are cut depends on a sequence's own length alone."""
    segments, q, pool = _inputs([(70, length), (3, 1), (0, 2), (200, 9)], 16, (4, 2, 16), torch.float32)
    together = paged_attention(q, pool, segments, SCALE, splits=3)
    alone = paged_attention(q[:length], pool, segments.part(0, 1), SCALE, splits=3)
    assert torch.equal(together[:length], alone)


REAL = [(32, 8, 128), (16, 2, 256), (16, 16, 64), (64, 4, 128)]


KINDS = [(heads, page_size, torch.bfloat16) for heads in REAL for page_size in (16, 64)]
KINDS += [(REAL[0], 16, torch.float16), (REAL[0], 64, torch.float8_e4m3fn), (REAL[0], 16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "page_size", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("ranges", BATCHES)
def test_real_sizes(ranges, heads, page_size, dtype):
    q_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    segments, q, pool = _inputs(BATCHES[ranges], page_size, heads, q_dtype, dtype)
    scale = heads[2] ** -0.5
    assert_close(paged_attention(q, pool, segments, scale), _expected(q, pool, segments, scale), q_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("longest", [1, 4, 300])
def test_a_graph_serves_other_batches(longest):
    """Captured once, replayed after the device tensors were overwritten with another batch of the same padded size."""
    heads, page_size = (32, 8, 128), 16
    first = [(n, min(longest, 2)) for n in (5, 100, 1000)]
    second = [(700, longest), (31, 1), (0, 1)]
    kinds = [_inputs(r, page_size, heads, torch.bfloat16) for r in (first, second)]
    tokens = max(len(q) for _, q, _ in kinds) + 4
    padded = [for_a_graph(s, 80, tokens - len(q) if longest == 1 else 2, longest) for s, q, _ in kinds]
    names = ("cu_lengths", "starts", "lengths", "page_table")
    widest, pool = max(padded, key=lambda p: p.num_tokens), max((pool for _, _, pool in kinds), key=len).clone()
    held = replace(widest, **{name: getattr(widest, name).clone() for name in names}, _made={})
    rows = torch.zeros(held.num_tokens, heads[0], heads[2], dtype=torch.bfloat16, device=DEVICE)
    paged_attention(rows, pool.zero_(), held, SCALE)
    graph = torch.cuda.CUDAGraph()
    held._made.clear()
    with torch.cuda.graph(graph):
        found = paged_attention(rows, pool, held, SCALE)
    for (segments, q, own), device in zip(kinds, padded, strict=True):
        for name in names:
            getattr(held, name).copy_(getattr(device, name))
        pool[: len(own)] = own
        pool[0] = 0
        rows[: len(q)] = q
        found.fill_(float("nan"))
        graph.replay()
        assert_close(found[: len(q)], _expected(q, pool, segments))
