"""The likeliest token of logits in parts: the first of those that are equal, and never one of the padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.ops import greedy, triton_greedy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "triton"])
def op(request):
    return {"reference": greedy, "triton": triton_greedy}[request.param].greedy


def _parts(rows, parts, width, dtype, values=3):
    """As they come together: by parts, then rows; ties everywhere."""
    return torch.randint(0, values, (parts, rows, width), device=DEVICE).to(dtype).movedim(0, 1)


@given(
    rows=st.integers(0, 3), parts=st.integers(1, 3), width=st.integers(1, 40), padding=st.integers(0, 39),
    block=st.sampled_from([16, 64]), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_is_the_first_of_the_best(rows, parts, width, padding, block, dtype):
    logits = _parts(rows, parts, width, dtype)
    vocab_size = parts * width - min(padding, width - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_greedy, "BLOCK", block)
        found = [op(logits, vocab_size).tolist() for op in (greedy.greedy, triton_greedy.greedy)]
    lists = greedy.whole(logits, vocab_size).tolist()
    assert found == [[row.index(max(row)) for row in lists]] * 2


def test_padding_is_never_the_likeliest(op):
    """Known fault: weights of padding are zeros, so its logits are 0, and more than those of any token here."""
    logits = torch.full((2, 2, 8), -1.0, device=DEVICE)
    logits[:, 1, 5:] = 0
    logits[1, 1, 4] = -0.5
    assert op(logits, 13).tolist() == [0, 12]


def test_rows_of_nothing_but_bans(op):
    assert op(torch.full((2, 1, 20), float("-inf"), device=DEVICE), 20).tolist() == [0, 0]


def test_float64_is_not_rounded(op):
    logits = torch.tensor([[[1.0, 1.0 + 1e-12, 1.0]]], dtype=torch.float64, device=DEVICE)
    assert op(logits, 3).tolist() == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 512])
@pytest.mark.parametrize(
    ("parts", "width", "vocab_size"), [(2, 51200, 102400), (1, 151936, 151936), (4, 25664, 102400)]
)
def test_real_sizes(rows, parts, width, vocab_size):
    logits = torch.randn(parts, rows, width, device=DEVICE).bfloat16().movedim(0, 1)
    flat = greedy.whole(logits, vocab_size).float()
    best = flat.max(-1, keepdim=True).values
    first = torch.where(flat == best, torch.arange(vocab_size, device=DEVICE), vocab_size).min(-1).values
    assert torch.equal(triton_greedy.greedy(logits, vocab_size), first)
