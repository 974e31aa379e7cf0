"""The ground our Triton kernels stand on: what they compute with means the same interpreted and compiled."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ops.cases import assert_close
from tessera.ops.triton_common import dot, num_processors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _product(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i
    tl.store(out + at, dot(tl.load(a + at), tl.load(b + at), None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype):
    """Also of bf16, which the interpreter's own `tl.dot` gets wrong, and of fp32 beyond tf32."""
    a, b = (torch.randn(16, 16, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"), device=DEVICE)
    _product[(1,)](a, b, out, N=16)
    assert_close(out, a.double() @ b.double(), torch.float32)


def test_processors():
    assert num_processors(torch.device(DEVICE)) > 0
