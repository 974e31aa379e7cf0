"""Paged attention: fast against plain, over scrambled page tables in pools where every unused token is NaN."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case, ends, paged
from tessera.ops.attention import paged_attention, paged_attention_reference, write_kv
from tessera.ops.segments import make_segments

HEADS = [(4, 4, 64), (6, 2, 32), (5, 1, 16), (3, 3, 24)]


def _inputs(ranges, page_size, heads, dtype, kv_dtype=None):
    num_q, num_kv, dim = heads
    torch.manual_seed(0)
    c = case(RANGES[ranges], page_size)
    kv = [torch.randn(end, 2, num_kv, dim).to(kv_dtype or dtype) for end in ends(c)]
    return c, torch.randn(c.segments.num_tokens, num_q, dim).to(dtype), paged(c, 2, num_kv, tokens=kv)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("ranges", RANGES)
def test_fast_is_plain(ranges, page_size, heads):
    c, q, pool = _inputs(ranges, page_size, heads, torch.float32)
    scale = heads[2] ** -0.5
    found = paged_attention(q, pool, c.segments, scale)
    assert_close(found, paged_attention_reference(q, pool, c.segments, scale))


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_dtypes(dtype, kv_dtype):
    c, q, pool = _inputs("mixed", 16, (6, 2, 32), dtype, kv_dtype)
    found = paged_attention(q, pool, c.segments, 0.2)
    assert found.dtype == dtype
    assert_close(found, paged_attention_reference(q.double(), pool.double(), c.segments, 0.2), dtype)


def test_reference_is_softmax_attention():
    """The plain reference against torch's own, on one sequence with one page."""
    c = case([(0, 9)], 16)
    q, k, v = (torch.randn(9, 2, 8, dtype=torch.float64) for _ in range(3))
    pool = paged(c, 2, 2, tokens=[torch.stack((k, v), 1)])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    ).transpose(0, 1)
    assert_close(paged_attention_reference(q, pool, c.segments, 8**-0.5), expected)


def test_write_lands_where_it_is_read():
    """What `write_kv` puts into pages is what `paged` puts there; nothing else in the pool changes."""
    c = case(RANGES["mixed"], 16)
    kv = [torch.randn(end, 2, 3, 8) for end in ends(c)]
    expected = paged(c, 2, 3, tokens=kv)
    pool = expected.clone()
    pool[c.segments.write_page, :, :, c.segments.write_offset] = 0
    new = torch.cat([values[start:] for values, start in zip(kv, c.segments.host_starts, strict=True)])
    write_kv(pool, new[:, 0], new[:, 1], c.segments)
    torch.testing.assert_close(pool, expected, equal_nan=True, rtol=0, atol=0)


def test_chunks_and_decodes_are_one_shot():
    """Attention of a sequence in chunks of any size is its attention at once (float64)."""
    length, page_size = 150, 16
    q, k, v = (torch.randn(length, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    whole = case([(0, length)], page_size)
    pool = paged(whole, 2, 2, tokens=[torch.stack((k, v), 1)])
    expected = paged_attention_reference(q, pool, whole.segments, 0.3)
    pool = torch.full_like(pool, float("nan"))
    start = 0
    for size in (64, 3, 1, 1, 80, 1):
        part = make_segments([start], [size], whole.segments.page_table.numpy(), [1], page_size)
        tokens = slice(start, start + size)
        write_kv(pool, k[tokens], v[tokens], part)
        assert_close(paged_attention(q[tokens], pool, part, 0.3), expected[tokens])
        start += size
