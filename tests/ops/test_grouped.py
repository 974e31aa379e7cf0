"""Experts by grouped products of libraries, against the plain twin: PyTorch's also on CPU, DeepGEMM's on a GPU."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch

from ops.cases import CHOICES, assert_close, check_experts, expert_ids, expert_weights
from tessera.ops import fused, moe
from tessera.ops.backend import backend, expert_runner
from tessera.ops.grouped import by_expert, experts_of, padded
from tessera.ops.triton_combine import combine
from tessera.ops.triton_sort import sort_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned_memory")
PLAIN = experts_of(fused.silu_mul, moe.combine)


_ids = partial(expert_ids, device=DEVICE)
_check = partial(check_experts, device=DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="there with bf16, at real sizes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_is_plain(num_tokens, choice, dtype):
    _check(PLAIN, num_tokens, 6, 40, 24, 3, dtype, choice)


def test_nothing_to_do():
    x, ids = torch.randn(3, 16, device=DEVICE), torch.full((3, 2), -1, device=DEVICE)
    none = x.new_empty(0, 16, 16)
    assert not PLAIN(x, none, none[:, :, :8], ids, torch.rand(3, 2, device=DEVICE)).any()
    assert PLAIN(x[:0], none, none, ids[:0], torch.rand(0, 2, device=DEVICE)).shape == (0, 16)


def test_rows_come_in_order_of_their_experts():
    ids = torch.tensor([[2, -1], [0, 2], [-1, 0]], device=DEVICE)
    order, ends = by_expert(ids, 4)
    assert order[:4].tolist() == [2, 5, 0, 3]
    assert ends.tolist() == [2, 2, 4, 4]


def test_a_token_elsewhere_in_the_batch_is_the_same_token():
    x, ids, weights = torch.randn(9, 16, device=DEVICE), _ids("any", 9, 5, 2), torch.rand(9, 2, device=DEVICE)
    y, places = torch.randn(18, 16, device=DEVICE), torch.randperm(18, device=DEVICE)
    ids[3, 1] = -1
    y[places[7]] = float("nan")  # nobody reads what is held elsewhere
    for sums in (moe.combine, combine):
        assert_close(sums(y, ids, weights, places), moe.combine(y[places], ids, weights))
        assert sums(y, ids, weights, places).shape == x.shape


@pytest.mark.parametrize("choice", CHOICES)
def test_blocks_are_padded(choice):
    """Every held row is in one place, all rows of a block are of its expert or none."""
    ids, block = _ids(choice, 30, 7, 2), 16
    found = sort_rows(ids, 7, block)
    rows, groups, places = padded(found.rows, found.blocks, block)
    flat = ids.flatten()
    held = (flat >= 0).nonzero().flatten()
    assert torch.equal(rows[places[held].long()], held.to(rows.dtype))
    assert torch.equal(groups[places[held].long()].long(), flat[held])
    assert (groups >= 0).sum() == len(held)
    for own in groups.view(-1, block).tolist():
        assert len({expert for expert in own if expert >= 0}) <= 1
        assert own[0] >= 0 or set(own) == {-1}, "padding follows rows"


REAL = {"dsv2lite": (64, 2048, 1408, 6), "a quarter": (64, 2048, 352, 6), "qwen3next": (512, 2048, 512, 10)}
REAL |= {"an eighth": (64, 2048, 88, 10), "abacus": (16, 192, 48, 4)}


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("num_tokens", [1, 7, 500, 4096])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_real_sizes(shape, num_tokens, choice):
    if choice != "any" and num_tokens != 500:
        pytest.skip("one size is enough for the odd choices")
    _check(expert_runner("grouped_mm", backend("triton")).experts, num_tokens, *shape, torch.bfloat16, choice)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="deep_gemm is not installed")
@pytest.mark.timeout(600)  # kernels are compiled when they are met first
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [REAL["dsv2lite"], REAL["qwen3next"]], ids=str)
def test_deep_gemm(shape, choice):
    from tessera.ops.deep_gemm import padded_experts

    _check(padded_experts, 2000, *shape, torch.bfloat16, choice)


@pytest.mark.gpu
def test_replayed_for_other_rows():
    """A graph recorded for one choice of experts serves any other: nothing of a batch is read on the host."""
    num, hidden, inner, top_k = REAL["abacus"]
    experts = expert_runner("grouped_mm", backend("triton")).experts
    w13, w2 = expert_weights(num, hidden, inner, torch.bfloat16, DEVICE)
    x, ids = torch.randn(40, hidden, device=DEVICE).bfloat16(), _ids("any", 40, num, top_k)
    weights = torch.rand(40, top_k, device=DEVICE)
    experts(x, w13, w2, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(x, w13, w2, ids, weights)
    for choice in CHOICES:
        x.copy_(torch.randn_like(x))
        ids.copy_(_ids(choice, 40, num, top_k))
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, experts(x, w13, w2, ids, weights))


def test_a_runner_has_the_routing_of_what_is_around_it():
    base = backend("torch")
    runner = expert_runner("grouped_mm", base)
    assert runner.route is base.route
    assert runner.experts is not base.experts
