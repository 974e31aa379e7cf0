"""Rows for other ranks: the kernels against their plain twins, and these against what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.ops.travel import TRAVEL as PLAIN
from tessera.ops.travel import Places, Travel, unpack
from tessera.ops.triton_travel import TRAVEL as FAST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS = 12


def made(num: int, hidden: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in rows with gaps, their experts, scores."""
    x = torch.randn(num, hidden + 3, device=DEVICE).to(dtype)[:, :hidden]
    ids = torch.rand(num, EXPERTS, device=DEVICE).topk(top_k, -1).indices
    return x, ids, torch.rand(num, top_k, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))


def holders(ranks: int) -> Tensor:
    """[W, E]: each expert at one rank; with five ranks the last two hold the same ones, and one of the others none."""
    if ranks == 5:
        at = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 3, 3, 3, 3])
        return torch.stack([at == 0, at == 1, at == 2, at == 3, at == 3]).to(DEVICE)
    return (torch.arange(ranks)[:, None] == torch.arange(EXPERTS) * ranks // EXPERTS).to(DEVICE)


def sent(form: Travel, case: tuple[Tensor, Tensor, Tensor], holds: Tensor) -> tuple[Places, Tensor]:
    places = form.places(case[1], holds)
    most = min(len(holds), case[1].shape[1] * int(holds.sum(0).max()))
    return places, form.pack(*case, places, most)[: int(places.counts.sum())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("num", "hidden", "top_k"), [(0, 8, 2), (1, 8, 1), (40, 33, 3)])
def test_kernels_are_plain(num: int, hidden: int, top_k: int, ranks: int, dtype: torch.dtype) -> None:
    case, holds = made(num, hidden, top_k, dtype), holders(ranks)
    (places, rows), (expected, plain) = sent(FAST, case, holds), sent(PLAIN, case, holds)
    assert torch.equal(places.nth, expected.nth)
    assert torch.equal(places.counts, expected.counts)
    for found, want in zip(unpack(rows, case[0], case[2]), unpack(plain, case[0], case[2]), strict=True):
        assert torch.equal(found, want)
    back = torch.randn(len(rows), hidden, device=DEVICE).to(dtype)
    apart = 2.0**-7 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.0  # the interpreter cuts off
    torch.testing.assert_close(FAST.collect(back, places), PLAIN.collect(back, places), rtol=apart, atol=apart / 8)


@pytest.mark.parametrize("num", [1025, 3000])
def test_more_tokens_than_a_program_looks_at_at_once(num: int) -> None:
    _, ids, _ = made(num, 8, 2, torch.float32)
    found, expected = (form.places(ids, holders(3)) for form in (FAST, PLAIN))
    assert torch.equal(found.nth, expected.nth)
    assert torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [2, 5])
def test_each_rank_gets_the_tokens_that_want_its_experts_once(ranks: int, dtype: torch.dtype) -> None:
    (x, ids, scores), holds = made(30, 9, 3, dtype), holders(ranks)
    places, rows = sent(PLAIN, (x, ids, scores), holds)
    for rank, own in enumerate(rows.split(places.counts.tolist())):
        wanting = [t for t in range(30) if any(holds[rank, e] for e in ids[t].tolist())]
        came = unpack(own, x, scores)
        assert torch.equal(came[0], x[wanting])
        assert torch.equal(came[1].long(), ids[wanting])
        assert torch.equal(came[2], scores[wanting])
    number = torch.cat([torch.full((n, 1), 10.0**rank) for rank, n in enumerate(places.counts.tolist())])
    total = PLAIN.collect(number.double().to(DEVICE), places)
    goes = (places.nth >= 0).double()
    assert torch.equal(total[:, 0], (goes * 10.0 ** torch.arange(ranks, device=DEVICE)[:, None]).sum(0))
