"""Experts: fast against plain; experts held elsewhere, empty ones, no tokens. Routing against its definition."""

from __future__ import annotations

import pytest
import torch

from ops.cases import assert_close
from tessera.ops import linear, moe
from tessera.ops.linear import has_amx
from tessera.ops.moe import Rules, experts, experts_reference, route

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def _weights(num: int, dtype: torch.dtype, hidden: int = 24, inner: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    w13 = torch.randn(num, 2 * inner, hidden) * hidden**-0.5
    return w13.to(dtype), (torch.randn(num, hidden, inner) * inner**-0.5).to(dtype)


def _check(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    found = experts(x, w13, w2, ids, weights)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    if len(x):
        expected = experts_reference(x.double(), w13.double(), w2.double(), ids, weights.double())
        assert_close(found, expected, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40, 700])
@pytest.mark.parametrize("held", ["all", "some", "none"])
def test_fast_is_plain(held: str, num_tokens: int, dtype: torch.dtype) -> None:
    w13, w2 = _weights(6, dtype)
    ids = torch.rand(num_tokens, 5).topk(3, -1).indices  # expert 5 is never chosen
    if held == "some":
        ids[ids % 2 == 0] = -1
    elif held == "none":
        ids[:] = -1
    _check(torch.randn(num_tokens, 24).to(dtype), w13, w2, ids, torch.rand(num_tokens, 3))


@pytest.mark.parametrize("num_tokens", [1, 3, 128, 129])
@pytest.mark.skipif(not has_amx(), reason="without AMX the swapped product is not used")
def test_swapped_products(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large experts in bfloat16: all tokens to one expert, and each to its own."""
    monkeypatch.setattr(linear, "SWAPPED_FROM", 0)
    calls = []
    monkeypatch.setattr(moe, "turned", lambda y: calls.append(y) or linear.turned(y))
    w13, w2 = _weights(4, torch.bfloat16, hidden=64, inner=96)
    x = torch.randn(num_tokens, 64).bfloat16()
    for ids in (torch.full((num_tokens, 1), 2), torch.arange(num_tokens)[:, None] % 4):
        _check(x, w13, w2, ids, torch.ones(num_tokens, 1))
    assert calls


def test_only_chosen_experts_are_read() -> None:
    w13, w2 = _weights(4, torch.float32)
    w13[[0, 3]] = w2[[0, 3]] = float("nan")
    ids = torch.tensor([[1, 2], [2, -1]])
    assert experts(torch.randn(2, 24), w13, w2, ids, torch.ones(2, 2)).isfinite().all()


def test_a_rank_without_experts_adds_nothing() -> None:
    w13, w2 = _weights(0, torch.float32)
    assert not experts(torch.randn(2, 24), w13, w2, torch.full((2, 2), -1), torch.ones(2, 2)).any()


def _routed(scores: list[float], choice: list[float], top_k: int, groups: int, top: int, by: str) -> list[int]:
    """The definition, for one token, in lists: best groups, then the best experts in them."""
    size = len(scores) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]

    def rank(group: list[int]) -> float:
        best = sorted((choice[e] for e in group), reverse=True)
        return best[0] if by == "max" else best[0] + best[1]

    kept = [e for group in sorted(members, key=rank, reverse=True)[:top] for e in group]
    return sorted(kept, key=lambda e: choice[e], reverse=True)[:top_k]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("groups", "top", "by"), [(1, 1, "max"), (4, 2, "max"), (4, 2, "top2"), (4, 4, "top2")])
def test_routing(groups: int, top: int, by: str, with_bias: bool, scoring: str) -> None:
    logits = torch.randn(50, 16, dtype=torch.float64)
    bias = torch.randn(16) if with_bias else None
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores + (0 if bias is None else bias.double())
    for normalize in (True, False):
        ids, weights = route(logits, Rules(3, scoring, bias, groups, top, by, normalize, 2.5))
        for t in range(50):
            expected = _routed(scores[t].tolist(), choice[t].tolist(), 3, groups, top, by)
            assert ids[t].tolist() == expected
            own = scores[t, expected]
            torch.testing.assert_close(weights[t], 2.5 * (own / own.sum() if normalize else own))


def test_routing_is_wide() -> None:
    """bfloat16 logits are scored in float32, float64 ones in float64."""
    logits = torch.randn(9, 8).bfloat16()
    assert route(logits, Rules(2))[1].dtype == torch.float32
    torch.testing.assert_close(route(logits, Rules(2))[1], route(logits.float(), Rules(2))[1])
    assert route(logits.double(), Rules(2))[1].dtype == torch.float64
