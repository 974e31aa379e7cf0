"""Norms against their formulas in float64, rounded once."""

from __future__ import annotations

import pytest
import torch

from tessera.ops.norm import add_rmsnorm, gated_rmsnorm, rmsnorm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-3  # large enough to be seen


def _plain(x: torch.Tensor, weight: torch.Tensor, zero_centred: bool = False) -> torch.Tensor:
    wide, w = x.double(), weight.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + w if zero_centred else w)


def _same(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Within one rounding of `dtype` (and the sums of float32)."""
    assert found.dtype == dtype
    rtol = max(torch.finfo(dtype).eps / 2 * 1.01, 1e-12) + (0 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-7 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 64), (1, 64), (0, 64)], ids=str)
def test_rmsnorm(shape: tuple[int, ...], zero_centred: bool, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(*shape) * 0.05).to(dtype), torch.randn(64)
    for w in {weight.to(dtype), weight}:  # weights may be wider than x
        _same(rmsnorm(x, w, EPS, zero_centred), _plain(x, w, zero_centred), dtype)


def test_rmsnorm_of_a_slice() -> None:
    x = torch.randn(6, 200)
    assert torch.equal(
        rmsnorm(x[:, 30:94], torch.ones(64), EPS), rmsnorm(x[:, 30:94].contiguous(), torch.ones(64), EPS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rmsnorm(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(4, 32).to(dtype), torch.randn(4, 32).to(dtype), torch.randn(32).to(dtype)
    normed, total = add_rmsnorm(x, residual, weight, EPS, zero_centred=True)
    assert torch.equal(total, x + residual)
    _same(normed, _plain(x + residual, weight, zero_centred=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_rmsnorm(dtype: torch.dtype) -> None:
    o, z, weight = torch.randn(4, 3, 32), torch.randn(4, 3, 32).to(dtype), torch.randn(32).to(dtype)
    wide = o.double() if dtype == torch.float64 else o  # o may be wider than z
    gate = z.double() * z.double().sigmoid()
    _same(gated_rmsnorm(wide, z, weight, EPS), _plain(wide, weight) * gate, dtype)
