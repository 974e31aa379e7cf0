"""A router's scores from bfloat16 tokens against the fp32 product; outputs are poisoned. Without a CUDA device in
Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tessera.ops import triton_route, triton_scores
from tessera.ops.linear import pack_reference
from tessera.ops.moe import Router, Rules, choose
from tessera.ops.triton_scores import PARTS, TILES, ScoreTile, scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ScoreTile(0, 16, 16, 32, 4, 2)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _as_exact_as_fp32(num_tokens: int, num_experts: int, hidden: int, tile: ScoreTile) -> None:
    """Errors of the fp32 product, measured in float64: not those of weights or scores in bfloat16."""
    x = torch.randn(num_tokens, hidden + 8, device=DEVICE).bfloat16()[:, :hidden]  # rows with gaps between them
    weight = torch.randn(num_experts, hidden, device=DEVICE) * hidden**-0.5
    exact = x.double() @ weight.double().T
    found = scores(x, weight, tile).sum(0)
    assert (found.dtype, found.shape) == (torch.float32, exact.shape)
    error = (found.double() - exact).abs().max().item()
    assert error <= 3 * max((x.float() @ weight.T - exact).abs().max().item(), 1e-6)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 16), (16, 5), (33, 40)])
def test_scores_are_those_of_the_fp32_product(num_tokens, num_experts):
    _as_exact_as_fp32(num_tokens, num_experts, 72, SMALL)


@pytest.mark.parametrize("offset", [0.0, 2.0**-9])
def test_no_bit_of_a_weight_is_lost(offset):
    """Known faults: weights rounded to bfloat16, or to two of them: these are all equal then."""
    step = 2.0**-22 if offset else 2.0**-16
    weight = torch.zeros(16, 8, device=DEVICE)
    weight[:, 0] = 1 + offset + torch.arange(16, device=DEVICE) * step
    x = torch.ones(3, 8, device=DEVICE).bfloat16()
    assert torch.equal(scores(x, weight, SMALL).sum(0), weight[:, 0].expand(3, -1))


@pytest.mark.parametrize("num_tokens", [9, 70, 200])
def test_tokens_are_not_widened(num_tokens, monkeypatch):
    """Those of bfloat16, in parts while they are few; others take the fp32 product."""
    weight = torch.randn(16, 200, device=DEVICE)
    router = Router(pack_reference(weight), True, Rules(3), torch.zeros(2, dtype=torch.int32, device=DEVICE))
    parts = []
    monkeypatch.setattr(triton_scores, "scores", lambda *inputs: parts.append(scores(*inputs)) or parts[-1])
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(num_tokens, 200, device=DEVICE).to(dtype)
        found, expected = triton_route.choose(x, router), choose(x, router)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    assert [len(part) for part in parts] == [PARTS if DEVICE == "cuda" or num_tokens < 128 else 1]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.m} tokens")
@pytest.mark.parametrize("num_experts", [64, 256, 160])
def test_real_sizes(num_experts, tile):
    for num_tokens in (17, 1000, 9000):
        _as_exact_as_fp32(num_tokens, num_experts, 2048, tile)
