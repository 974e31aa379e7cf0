"""Attention by batched products: it is attention, with scores finer than what a product of bfloat16 gives."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case, ends, paged
from tessera.ops import products
from tessera.ops.attention import paged_attention, paged_attention_reference
from tessera.ops.linear import has_bf16
from tessera.ops.mla import mla_absorbed, mla_absorbed_reference
from tessera.ops.products import attend_by_products, products_pay

pytestmark = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bfloat16 products")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases take this path too."""
    monkeypatch.setattr(products, "LEAST", 1)


def test_only_for_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert products_pay(torch.device("cpu"), BF16, 10)
    assert not products_pay(torch.device("cpu"), torch.float32, 10)
    assert not products_pay(torch.device("cuda"), BF16, 10)
    monkeypatch.setattr(products, "LEAST", 11)
    assert not products_pay(torch.device("cpu"), BF16, 10)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("ranges", RANGES)
def test_paged_attention(ranges: str, page_size: int) -> None:
    """Over pools where whatever a range may not read is NaN."""
    torch.manual_seed(0)
    c = case(RANGES[ranges], page_size)
    pool = paged(c, 2, 2, tokens=[torch.randn(end, 2, 2, 32).to(BF16) for end in ends(c)])
    q = torch.randn(c.segments.num_tokens, 6, 32).to(BF16)
    found = paged_attention(q, pool, c.segments, 0.2)
    assert_close(found, paged_attention_reference(q.double(), pool.double(), c.segments, 0.2), BF16)


@pytest.mark.parametrize("ranges", ["decodes", "verify"])
def test_latent_attention(ranges: str) -> None:
    torch.manual_seed(0)
    c = case(RANGES[ranges], 16)
    pool = paged(c, tokens=[torch.randn(end, 40).to(BF16) for end in ends(c)])
    q, roped = (torch.randn(c.segments.num_tokens, 4, width).to(BF16) for width in (24, 8))
    kv_b = (torch.randn(4, 48, 32) * 32**-0.5).to(BF16)
    found = mla_absorbed(q, roped, kv_b, pool, c.segments, 0.2)
    wide = [x.double() for x in (q, roped, kv_b, pool)]
    expected = mla_absorbed_reference(*wide, c.segments, 0.2)
    assert_close(found, expected, BF16)


@pytest.mark.parametrize("shape", [(3, 2, 2, 48, 64), (9, 8, 1, 80, 128), (1, 1, 16, 160, 576)], ids=str)
def test_large_scores_are_not_rounded_to_bfloat16(shape: tuple[int, ...]) -> None:
    """Scores near 100, where neighbours in bfloat16 are 0.5 apart: a softmax of those would be wrong by a half."""
    torch.manual_seed(0)
    num, heads, queries, length, dim = shape
    q = (1 + torch.randn(num, heads, queries, dim) / 50).to(BF16)
    k = (100 / dim + torch.randn(num, heads, length, dim) / dim).to(BF16)
    v = torch.randn(num, heads, length, dim).to(BF16)
    scores = q.double() @ k.double().mT
    found = attend_by_products(q, k, v, None, 1.0)
    assert scores.amax() > 90
    assert_close(found, scores.softmax(-1) @ v.double(), BF16)
    rounded = scores.to(BF16).double().softmax(-1) @ v.double()
    with pytest.raises(AssertionError):
        assert_close(rounded, scores.softmax(-1) @ v.double(), BF16)
