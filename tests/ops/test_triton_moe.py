"""Experts' kernels against the plain twin; outputs are poisoned. Without a CUDA device in Triton's interpreter, which
cuts a float32 off where it makes a bfloat16 of it: twice the tolerance there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ops.cases import TOLERANCE
from tessera.ops import triton_sort
from tessera.ops.moe import experts_reference, route
from tessera.ops.triton_moe import TILES, Tile, Tiles, experts, grouped_experts
from tessera.ops.triton_moe_few import few_experts
from tessera.ops.triton_route import route as fast_route
from tessera.ops.triton_sort import sort_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
SMALL = Tiles(1, Tile(16, 16, 16, 4, 2), Tile(16, 16, 16, 4, 2, 2))
BOXES = Tiles(1, Tile(16, 16, 16, 4, 2, 2, True), Tile(16, 16, 16, 4, 2, 1, True))
CHOICES = ["any", "some held", "one expert", "none held"]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What is made without values holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _weights(num: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    w13 = torch.randn(num, 2 * inner, hidden, device=DEVICE) * hidden**-0.5
    return w13.to(dtype), (torch.randn(num, hidden, inner, device=DEVICE) * inner**-0.5).to(dtype)


def _ids(choice: str, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """The last expert is never chosen."""
    if choice == "one expert":
        return torch.full((num_tokens, top_k), 1)
    ids = torch.rand(num_tokens, num_experts - 1).topk(top_k, -1).indices
    if choice == "some held":
        ids[ids % 2 == 0] = -1
    return torch.full_like(ids, -1) if choice == "none held" else ids


def _check(form, num_tokens, num, hidden, inner, top_k, dtype, choice="any") -> None:
    x = torch.randn(num_tokens, hidden + 8, device=DEVICE).to(dtype)[:, :hidden]  # rows with gaps between them
    w13, w2 = _weights(num, hidden, inner, dtype)
    w13[-1], w2[-1] = float("nan"), float("nan")
    ids, weights = _ids(choice, num_tokens, num, top_k), torch.rand(num_tokens, top_k)
    found = form(x, w13, w2, ids.to(DEVICE), weights.to(DEVICE))
    assert (found.dtype, found.shape) == (dtype, x.shape)
    wide = torch.float32 if DEVICE == "cuda" else torch.float64
    expected = _reference(x.to(wide), w13, w2, ids.to(DEVICE), weights.to(DEVICE))
    limit = TOLERANCE[dtype] * (2 if DEVICE == "cpu" and dtype == torch.bfloat16 else 1)
    difference = (found.to(wide) - expected).abs().max().item()
    assert difference <= limit * expected.abs().max().item(), f"{difference} of {expected.abs().max()}"


def _reference(x, w13, w2, ids, weights) -> torch.Tensor:
    """The plain twin, expert by expert so that the widened weights stay small."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e >= 0:
            own = torch.where(ids == e, 0, -1)
            out += experts_reference(x, w13[e : e + 1].to(x.dtype), w2[e : e + 1].to(x.dtype), own, weights.to(x.dtype))
    return out


def _grouped(*inputs: torch.Tensor) -> torch.Tensor:
    return grouped_experts(*inputs, SMALL)


def _boxed(*inputs: torch.Tensor) -> torch.Tensor:
    return grouped_experts(*inputs, BOXES)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("form", [few_experts, _grouped, _boxed])
def test_kernels_are_plain(form, choice, dtype):
    _check(form, 20, 6, 40, 24, 3, dtype, choice)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 70])
def test_any_number_of_tokens(num_tokens):
    """Through the choice of tiles that serving makes."""
    x, (w13, w2) = torch.randn(num_tokens, 32, device=DEVICE), _weights(5, 32, 16, torch.float32)
    ids, weights = _ids("any", num_tokens, 5, 3).to(DEVICE), torch.rand(num_tokens, 3, device=DEVICE)
    found = experts(x, w13, w2, ids, weights)
    torch.testing.assert_close(found, experts_reference(x, w13, w2, ids, weights), rtol=1e-5, atol=1e-5)
    assert not experts(x, w13[:0], w2[:0], torch.full_like(ids, -1), weights).any()


@pytest.mark.usefixtures("poisoned")
def test_other_rows_do_not_matter():
    """To the bit: a token alone, first or last among others, and with more of its expert's rows beside it."""
    x, (w13, w2) = torch.randn(40, 32, device=DEVICE), _weights(4, 32, 16, torch.float32)
    ids, weights = _ids("any", 40, 4, 2).to(DEVICE), torch.rand(40, 2, device=DEVICE)
    together = _grouped(x, w13, w2, ids, weights)
    for part in (slice(0, 17), slice(39, 40), slice(3, 36)):
        assert torch.equal(_grouped(x[part], w13, w2, ids[part], weights[part]), together[part])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_rows", [1, 50, 300])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("one", [4096, 64])
def test_sorting(one, choice, num_rows, monkeypatch):
    """Every held row is in exactly one block, of its expert, of at most 16 rows; one launch, or chunks of 32 rows."""
    monkeypatch.setattr(triton_sort, "ONE", one)
    monkeypatch.setattr(triton_sort, "CHUNK", 32)
    ids = _ids(choice, num_rows, 7, 2).to(DEVICE)
    by_expert, flat, seen = sort_rows(ids, 7, 16), ids.flatten(), []
    for expert, first, end in by_expert.blocks.tolist():
        if expert >= 0:
            rows = by_expert.rows[first:end].long()
            assert 0 < len(rows) <= 16
            assert (flat[rows] == expert).all()
            seen.append(rows)
    placed = torch.cat(seen) if seen else flat[:0]
    assert sorted(placed.tolist()) == (flat >= 0).nonzero().flatten().tolist()


ROUTERS = [
    {},
    {"normalize": False, "scale": 2.5},
    {"scoring": "sigmoid", "bias": True},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 4, "top_groups": 2, "group_score": "top2", "scoring": "sigmoid", "bias": True},
]


def _routed_alike(logits: torch.Tensor, top_k: int, options: dict) -> None:
    bias = torch.randn(logits.shape[1], device=DEVICE) if options.get("bias") else None
    ids, weights = fast_route(logits, top_k, **options | {"bias": bias})
    expected, expected_weights = route(logits, top_k, **options | {"bias": bias})
    assert (ids.dtype, weights.dtype) == (expected.dtype, expected_weights.dtype)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("num_experts", [16, 20])
def test_routing_is_plain(num_experts, options):
    _routed_alike(torch.randn(5, num_experts, device=DEVICE), 3, options)


@pytest.mark.parametrize("options", ROUTERS[:2], ids=str)
def test_of_equal_scores_the_first_is_chosen(options):
    """As in bfloat16, where experts often score alike."""
    logits = torch.randint(0, 3, (6, 16), device=DEVICE).bfloat16()
    _routed_alike(logits, 5, options)
    ids, _ = fast_route(torch.zeros(1, 16, device=DEVICE), 3)
    assert ids.tolist() == [[0, 1, 2]]


REAL = {"dsv2lite": (64, 2048, 1408, 6), "a quarter": (64, 2048, 352, 6), "qwen3next": (512, 2048, 512, 10)}
REAL |= {"a half": (64, 2048, 704, 6), "an eighth": (64, 2048, 88, 10), "abacus": (16, 192, 48, 4)}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 500, 4096])
@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
def test_real_sizes(shape, num_tokens):
    _check(experts, num_tokens, *shape, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tiles", TILES, ids=lambda t: f"{t.up.m} rows")
@pytest.mark.parametrize("choice", CHOICES)
def test_real_tiles(choice, tiles):
    _check(lambda *inputs: grouped_experts(*inputs, tiles), 300, *REAL["a quarter"], torch.bfloat16, choice)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("num_experts", [64, 512])
def test_real_routing(num_experts, options):
    _routed_alike(torch.randn(3000, num_experts, device=DEVICE), 8, options)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 700])
def test_replayed_for_other_rows(num_tokens):
    """A graph recorded for one choice of experts serves any other."""
    num, hidden, inner, top_k = REAL["abacus"]
    w13, w2 = _weights(num, hidden, inner, torch.bfloat16)
    x, ids = torch.randn(num_tokens, hidden, device=DEVICE).bfloat16(), _ids("any", num_tokens, num, top_k).to(DEVICE)
    weights = torch.rand(num_tokens, top_k, device=DEVICE)
    experts(x, w13, w2, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(x, w13, w2, ids, weights)
    for choice in CHOICES:
        x.copy_(torch.randn_like(x))
        ids.copy_(_ids(choice, num_tokens, num, top_k))
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, experts(x, w13, w2, ids, weights))
