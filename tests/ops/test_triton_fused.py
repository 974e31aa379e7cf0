"""Promise: norms and gates as Triton kernels compute what their plain twins do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops import fused, linear, norm, triton_fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a device rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-2}
SHAPES = [(1, 1), (3, 40), (5, 128)] + ([(700, 4096), (16, 2048)] if DEVICE == "cuda" else [])


def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Columns of a wider tensor: rows have gaps."""
    return torch.randn(rows, columns + 7, device=DEVICE).to(dtype)[:, 3 : columns + 3]


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < TOLERANCE[found.dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms(dtype: torch.dtype, shape: tuple[int, int], zero_centred: bool) -> None:
    x, residual = random(*shape, dtype), random(*shape, dtype)
    weight = torch.rand(shape[1], device=DEVICE).to(dtype)
    same(triton_fused.rmsnorm(x, weight, 1e-6, zero_centred), norm.rmsnorm(x, weight, 1e-6, zero_centred))
    found = triton_fused.add_rmsnorm(x, residual, weight, 1e-6, zero_centred)
    for one, expected in zip(found, norm.add_rmsnorm(x, residual, weight, 1e-6, zero_centred), strict=True):
        same(one, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    y = random(shape[0], 2 * shape[1], dtype)
    same(triton_fused.silu_mul(y), fused.silu_mul(y))
    x, gate = random(*shape, dtype), random(*shape, dtype)
    same(triton_fused.sigmoid_mul(x, gate), fused.sigmoid_mul(x, gate))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shared_expert_is_added(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    part, shared, x = (random(*shape, dtype).contiguous() for _ in range(3))
    gate = linear.pack_reference(torch.randn(1, shape[1], device=DEVICE).to(dtype))
    for one in (gate, None):
        same(triton_fused.add_gated(part, shared, x, one), fused.add_gated(part, shared, x, one))


def test_no_rows() -> None:
    none, weight = random(0, 8, torch.float32), torch.ones(8, device=DEVICE)
    assert triton_fused.rmsnorm(none, weight, 1e-6).shape == (0, 8)
    assert triton_fused.silu_mul(none).shape == (0, 4)
