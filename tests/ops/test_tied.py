"""The two ends of a model from one matrix: rows and products, whatever form it is kept in."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.functional import linear as plain

from tessera.ops import linear as linear_ops
from tessera.ops import tied
from tessera.ops.linear import has_bf16, linear, prepacked
from tessera.ops.tied import Blocks, tie, tie_reference

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no bfloat16 products")


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_ops, "has_amx", lambda: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [tie, tie_reference])
@pytest.mark.parametrize("shape", [(640, 96), (1000, 64), (7, 33)], ids=str)
def test_rows_and_products(shape: tuple[int, int], make, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    ends = make(weight.clone())
    ids = torch.randint(0, shape[0], (50,))
    assert torch.equal(ends.rows(ids), weight[ids])
    assert ends.rows(ids[:0]).shape == (0, shape[1])
    x = torch.randn(3, shape[1]).to(dtype)
    expected = plain(x.double(), weight.double())
    torch.testing.assert_close(linear(x, ends.head).double(), expected, rtol=1e-2, atol=1e-1)


@needs_bf16
def test_packed_it_is_held_once(no_amx: None) -> None:
    """Every row comes out of the packed form, which outlives the weight and is all there is."""
    weight = torch.randn(1000, 64).bfloat16()
    ends, kept = tie(weight), weight.clone()
    assert isinstance(ends.rows, Blocks)
    assert ends.head.product is prepacked
    assert ends.rows.packed is ends.head.weight
    assert ends.rows.pairs.data_ptr() == torch.ops.mkldnn.data_ptr(ends.head.weight)
    del weight
    gc.collect()
    torch.randn(1000, 64)  # would take memory that was given back
    assert torch.equal(ends.rows(torch.arange(1000)), kept)


@needs_bf16
def test_a_form_that_is_not_known_is_not_read(no_amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of other widths have the right size and the wrong rows: the weight stays as it is."""
    weight = torch.randn(960, 64).bfloat16()
    known = tie(weight).rows
    assert isinstance(known, Blocks)
    width = known.pairs.shape[2]
    monkeypatch.setattr(tied, "WIDTHS", tuple(w for w in (64, 48, 32, 16) if w != width))
    ends = tie(weight)
    assert ends.head.weight is weight
    assert torch.equal(ends.rows(torch.arange(960)), weight)
