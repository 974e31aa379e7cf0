"""Groups of small operations on a CPU against their plain twins in float64, whatever the blocks that they work in."""

from __future__ import annotations

import pytest
import torch

from ops.cases import RANGES, assert_close, case
from tessera.core.spec import RopeSpec
from tessera.ops import cpu_fused, fused
from tessera.ops.backend import TORCH
from tessera.ops.fused import HeadInputs
from tessera.ops.norm import add_rmsnorm
from tessera.ops.rope import rope_tables

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Q = slice(0, 96)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven tokens of four heads; nothing is left to torch's composite norm."""
    monkeypatch.setattr(cpu_fused, "BLOCK", 7 * 128)
    monkeypatch.setattr(cpu_fused, "FEW", 0)


def _inputs(gated: bool, normed: bool, zero_centred: bool, interleaved: bool, dim: int, dtype: torch.dtype):
    """Three query heads and one key head of 32, of which `dim` dims are rotated; a gate may lie between them."""
    tables = rope_tables(RopeSpec(dim, 1e4), 4096, dtype)
    norms = [(torch.randn(32) / 2).to(dtype) if normed else None for _ in range(2)]
    key, value = (slice(at + 96 * gated, at + 96 * gated + 32) for at in (96, 128))
    return HeadInputs(Q, key, value, 32, tables, interleaved, *norms, 1e-3, zero_centred)


def _as(inputs: HeadInputs, dtype: torch.dtype) -> HeadInputs:
    norms = [None if n is None else n.to(dtype) for n in (inputs.q_norm, inputs.k_norm)]
    tables = type(inputs.tables)(inputs.tables.cos.to(dtype), inputs.tables.sin.to(dtype))
    spans = inputs.q, inputs.k, inputs.v, inputs.dim
    return HeadInputs(*spans, tables, inputs.interleaved, *norms, inputs.eps, inputs.zero_centred)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gated", "normed", "zero_centred", "interleaved", "dim"),
    [
        (False, True, False, False, 32),
        (True, True, True, False, 8),
        (False, False, False, True, 32),
        (True, False, False, True, 16),
    ],
)
def test_write_heads(gated, normed, zero_centred, interleaved, dim, dtype) -> None:
    torch.manual_seed(0)
    inputs = _inputs(gated, normed, zero_centred, interleaved, dim, dtype)
    c = case(RANGES["mixed"], 16)
    y = torch.randn(c.segments.num_tokens, 160 + 96 * gated).to(dtype)
    kept, pools = y.clone(), [torch.zeros(c.num_pages, 2, 1, 16, 32, dtype=d) for d in (dtype, torch.float64)]
    found = cpu_fused.write_heads(y, inputs, pools[0], c.segments)
    again = case(RANGES["mixed"], 16)
    expected = fused.write_heads(y.double(), _as(inputs, torch.float64), pools[1], again.segments)
    assert found.dtype == dtype
    assert torch.equal(y, kept)
    assert_close(found, expected, dtype)
    assert_close(pools[0], pools[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_norms(rows: int, zero_centred: bool, dtype: torch.dtype) -> None:
    """Rounded once, whatever is beside it; what is added stays as it was."""
    x, residual, weight = ((torch.randn(*shape) / 20).to(dtype) for shape in ((rows, 64), (rows, 64), (64,)))
    kept = x.clone(), residual.clone()
    normed, total = cpu_fused.add_rmsnorm(x, residual, weight, 1e-3, zero_centred)
    expected, _ = add_rmsnorm(total.double(), total.double() * 0, weight.double(), 1e-3, zero_centred)
    assert torch.equal(total, x + residual)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    assert torch.equal(normed, cpu_fused.rmsnorm(total, weight, 1e-3, zero_centred))
    rtol = max(torch.finfo(dtype).eps / 2 * 1.01, 1e-12) + (0 if dtype == torch.float64 else 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=rtol, atol=1e-7 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    y = torch.randn(9, 96).to(dtype)
    kept = y.clone()
    assert_close(cpu_fused.silu_mul(y), fused.silu_mul(y.double()), dtype)
    assert torch.equal(y, kept)


def test_the_engine_runs_them() -> None:
    assert TORCH.write_heads is cpu_fused.write_heads
    assert (TORCH.rmsnorm, TORCH.add_rmsnorm) == (cpu_fused.rmsnorm, cpu_fused.add_rmsnorm)
