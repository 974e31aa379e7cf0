"""Products with prepared weights: each form against the plain one, rows alone and in company, no second copy."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear as plain

from tessera.ops import linear as ops
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
)

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
