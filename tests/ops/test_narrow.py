"""Pages in fp8: what is too large becomes the largest number, and what is read is what was rounded."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case, ends, paged
from tessera.ops import attention, mla
from tessera.ops.narrow import narrowed

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_numbers_beyond_the_largest_become_the_largest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([1.0, largest, largest * 1.1, 1e9, float("inf")], dtype=torch.float64)
    expected = torch.tensor([1.0, largest, largest, largest, largest])
    for sign in (1, -1):
        assert torch.equal(narrowed(sign * x, dtype).float(), sign * expected)
    assert narrowed(torch.tensor([float("nan")]), dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("ranges", ["mixed", "decodes", "verify"])
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_what_was_written(ranges: str, dtype: torch.dtype, model: torch.dtype) -> None:
    """Both versions over pages in fp8, against plain attention over the rounded numbers."""
    c = case(RANGES[ranges], 16)
    kv = [torch.randn(end, 2, 2, 32).to(dtype) for end in ends(c)]
    pool = paged(c, 2, 2, tokens=kv)
    new = torch.randn(c.segments.num_tokens, 2, 2, 32)
    attention.write_kv(pool, new[:, 0], new[:, 1], c.segments)
    q = torch.randn(c.segments.num_tokens, 6, 32).to(model)
    wide = pool.double()
    at = c.segments.write_page.long(), slice(None), slice(None), c.segments.write_offset.long()
    assert torch.equal(wide[at], new.to(dtype).double())
    expected = attention.paged_attention_reference(q.double(), wide, c.segments, 0.2)
    for version in (attention.paged_attention, attention.paged_attention_reference):
        assert_close(version(q, pool, c.segments, 0.2), expected, model)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_latents_are_read_as_they_were_written(dtype: torch.dtype) -> None:
    c = case(RANGES["mixed"], 16)
    pool = paged(c, tokens=[torch.randn(end, 40).to(dtype) for end in ends(c)])
    new = torch.randn(c.segments.num_tokens, 40)
    mla.write_latent(pool, new[:, :32], new[:, 32:], c.segments)
    wide = pool.double()
    assert torch.equal(wide[c.segments.write_page, c.segments.write_offset], new.to(dtype).double())
    q_rope, q_nope = (torch.randn(len(new), 3, n) for n in (8, 16))
    kv_b = torch.randn(3, 28, 32) * 32**-0.5
    expected = mla.mla_expanded_reference(q_nope.double(), q_rope.double(), kv_b.double(), wide, c.segments, 0.2)
    for version in (
        mla.mla_absorbed, mla.mla_absorbed_reference, mla.mla_expanded, mla.mla_expanded_reference,
    ):  # fmt: skip
        assert_close(version(q_nope, q_rope, kv_b, pool, c.segments, 0.2), expected, torch.float32)
