"""Products with prepared weights: each form against the plain one, rows alone and in company, no second copy."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear as plain

from held import Held
from tessera.ops import linear as ops
from tessera.ops import moe
from tessera.ops.linear import (
    PackedLinear,
    has_amx,
    has_bf16,
    linear,
    pack,
    pack_reference,
    prepack,
    prepacked,
    swapped,
    unrounded,
)
from tessera.ops.moe import experts, experts_reference

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bfloat16 products")
FORMS = {
    "packed": pack,
    "reference": pack_reference,
    "swapped": lambda w, b=None: PackedLinear(w, b, swapped),
    "prepacked": lambda w, b=None: PackedLinear(prepack(w), b, prepacked),
}


def _inputs(dtype: torch.dtype, rows: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.randn(*rows, 96).to(dtype), torch.randn(200, 96).to(dtype), torch.randn(200).to(dtype)


@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (33,), (128,), (129,), (300,), (3, 5)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@needs_bf16
def test_every_form_is_the_plain_product(form: str, rows: tuple[int, ...]) -> None:
    x, weight, bias = _inputs(torch.bfloat16, rows)
    with torch.inference_mode():
        for b in (None, bias):
            packed = FORMS[form](weight, b)
            found, expected = linear(x, packed), plain(x.double(), weight.double(), None if b is None else b.double())
            assert found.shape == expected.shape
            assert found.is_contiguous()
            torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_dtypes_stay_plain(dtype: torch.dtype) -> None:
    x, weight, bias = _inputs(dtype, (7,))
    packed = pack(weight, bias)
    assert packed.weight is weight
    assert torch.equal(linear(x, packed), plain(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("numbers", [1, 96 * 64, 1 << 19])
def test_what_is_unrounded_is_the_wide_product_in_blocks_of_any_size(
    numbers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "WIDENED", numbers)
    for rows in ((0,), (1,), (7,), (3, 5)):
        x, weight, bias = _inputs(dtype, rows)
        for b in (None, bias):
            found = unrounded(x, pack(weight, b, packs=False))
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            expected = plain(x.double(), weight.double(), None if b is None else b.double())
            assert found.shape == expected.shape
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_wide_product_holds_no_second_copy() -> None:
    """Known fault: every call made a wide copy of the whole weight, up to 14 times the product's own time."""
    x, weight = torch.randn(2, 1024).bfloat16(), torch.randn(4096, 1024).bfloat16()
    packed = pack(weight, packs=False)
    with Held() as held, torch.inference_mode():
        unrounded(x, packed)
    assert held.peak <= 4 * (ops.WIDENED + x.numel() + 2 * len(weight)) < 4 * weight.numel()


@pytest.mark.parametrize("swaps", [False, True])
def test_experts_are_unrounded_in_either_form(swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights as left factors, as on AMX, too."""
    monkeypatch.setattr(moe, "swaps_pay", lambda weight: swaps)
    x, w13, w2 = (torch.randn(*size).bfloat16() / 4 for size in ((9, 32), (3, 32, 32), (3, 32, 16)))
    ids, weights = torch.rand(9, 3).topk(2, -1).indices, torch.rand(9, 2)
    ids[:, 0] = torch.arange(9) % 3 - 1  # one expert has one row, which has a form of its own
    for wide in (True, False):
        found, expected = (form(x, w13, w2, ids, weights, wide) for form in (experts, experts_reference))
        assert found.dtype == (torch.float32 if wide else torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert (experts(x, w13, w2, ids, weights, True).bfloat16() != experts(x, w13, w2, ids, weights, True)).any()


def test_strided_rows() -> None:
    wide = torch.randn(5, 400).bfloat16()
    weight = torch.randn(64, 96).bfloat16()
    assert torch.equal(swapped(wide[:, 40:136], weight), swapped(wide[:, 40:136].contiguous(), weight))


def test_turning_large_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "TURNED", 16)
    x, weight, _ = _inputs(torch.bfloat16, (3,))
    torch.testing.assert_close(swapped(x, weight), plain(x, weight))


@pytest.mark.skipif(not has_amx(), reason="without AMX the swapped product is not used")
def test_a_row_has_the_same_bits_in_any_company() -> None:
    x = torch.randn(128, 1024).bfloat16()
    weight = torch.randn(512, 1024).bfloat16()
    whole = swapped(x, weight)
    for rows in (1, 2, 3, 8, 17, 32, 100):
        assert torch.equal(swapped(x[:rows], weight), whole[:rows])


@needs_bf16
def test_no_form_holds_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed is all that is kept."""
    weight = torch.randn(256, 256).bfloat16()
    monkeypatch.setattr(ops, "has_amx", lambda: False)
    packed = pack(weight)
    assert packed.product is prepacked
    assert packed.weight.layout == torch._mkldnn
    assert torch.ops.mkldnn._nbytes(packed.weight) == weight.nbytes
    assert pack(weight, packs=False).weight is weight
