"""Multi-head latent attention: fast against plain, absorbed against expanded, over pools poisoned with NaN."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case, ends, paged
from tessera.ops.mla import (
    mla_absorbed,
    mla_absorbed_reference,
    mla_expanded,
    mla_expanded_reference,
    write_latent,
)

RANK, ROPE = 40, 8
SCALE = 0.2


def _inputs(ranges, page_size, heads, nope, value, dtype):
    torch.manual_seed(0)
    c = case(RANGES[ranges], page_size)
    pool = paged(c, tokens=[torch.randn(end, RANK + ROPE).to(dtype) for end in ends(c)])
    q_nope, q_rope = (torch.randn(c.segments.num_tokens, heads, n).to(dtype) for n in (nope, ROPE))
    kv_b = (torch.randn(heads, nope + value, RANK) * RANK**-0.5).to(dtype)
    return c.segments, pool, q_nope, q_rope, kv_b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "nope", "value"), [(4, 16, 16), (3, 24, 16), (1, 8, 32)])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("ranges", RANGES)
def test_fast_is_plain(ranges, page_size, heads, nope, value, dtype):
    if page_size != 16 and dtype != torch.float32:
        pytest.skip("page sizes are tried in float32")
    segments, pool, q_nope, q_rope, kv_b = _inputs(ranges, page_size, heads, nope, value, dtype)
    wide = [x.double() for x in (q_nope, q_rope, kv_b, pool)]
    found = mla_expanded(q_nope, q_rope, kv_b, pool, segments, SCALE)
    assert_close(found, mla_expanded_reference(*wide, segments, SCALE), dtype)
    found = mla_absorbed(q_nope, q_rope, kv_b, pool, segments, SCALE)
    assert_close(found, mla_absorbed_reference(*wide, segments, SCALE), dtype)


def test_absorbed_is_expanded():
    segments, pool, q_nope, q_rope, kv_b = _inputs("mixed", 16, 3, 24, 16, torch.float64)
    found = mla_absorbed_reference(q_nope, q_rope, kv_b, pool, segments, SCALE)
    assert_close(found, mla_expanded_reference(q_nope, q_rope, kv_b, pool, segments, SCALE))


def test_a_part_of_the_segments_alone():
    """Long ranges expanded and short ones absorbed, each on its part of the step."""
    segments, pool, q_nope, q_rope, kv_b = _inputs("mixed", 16, 2, 8, 8, torch.float64)
    whole = mla_expanded_reference(q_nope, q_rope, kv_b, pool, segments, SCALE)
    for first, last in ((0, 3), (3, 7)):
        part, tokens = segments.part(first, last), segments.tokens_of(first, last)
        found = mla_expanded(q_nope[tokens], q_rope[tokens], kv_b, pool, part, SCALE)
        assert_close(found, whole[tokens])
        found = mla_absorbed(q_nope[tokens], q_rope[tokens], kv_b, pool, part, SCALE)
        assert_close(found, whole[tokens])


def test_write_lands_where_it_is_read():
    c = case(RANGES["mixed"], 16)
    values = [torch.randn(end, RANK + ROPE) for end in ends(c)]
    expected = paged(c, tokens=values)
    pool = expected.clone()
    pool[c.segments.write_page, c.segments.write_offset] = 0
    new = torch.cat([v[start:] for v, start in zip(values, c.segments.host_starts, strict=True)])
    write_latent(pool, new[:, :RANK], new[:, RANK:], c.segments)
    torch.testing.assert_close(pool, expected, equal_nan=True, rtol=0, atol=0)
