"""Promise: however tokens get to their experts, they get the same sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from comm.ranks import CPU, as_threads, raise_first
from tessera.comm.base import Comm
from tessera.comm.dispatch import BySize, Dispatch, Everywhere, Experts, Padded, Travelling, dispatch
from tessera.comm.waits import Waits, drain
from tessera.core.mesh import Mesh, instance_mesh
from tessera.ops.travel import TRAVEL

EXPERTS, TOP_K, HIDDEN = 8, 3, 16


@dataclass(frozen=True)
class Toy:
    """Experts whose rows do not depend on the rows beside them, to the bit. `shares`: ranks that share a shared one."""

    held: Sequence[int]
    shares: int = 1

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = x[:, :EXPERTS].topk(TOP_K)
        return chosen.indices, chosen.values

    def part(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        part = torch.zeros_like(x)
        for k in range(TOP_K):
            mine = torch.tensor([i in self.held for i in ids[:, k].tolist()], dtype=torch.bool)
            part += torch.where(mine[:, None], torch.tanh(x * (ids[:, k, None] + 1)) * scores[:, k, None], 0)
        return part

    def whole(self, x: Tensor) -> Tensor:
        return self.joined(self.part(x, *self.route(x)), self.shared(x), x)

    def shared(self, x: Tensor) -> Tensor | None:
        return x * (2.0 / self.shares)

    def joined(self, part: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        assert shared is not None
        return part + shared


def rows_of(dp: int, count: int, dtype: torch.dtype) -> Tensor:
    """The tokens of a DP rank; those of rank 1 want the first experts only."""
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(dp)).to(dtype)
    if dp == 1:
        x[:, : EXPERTS // 2] += 8
    return x


def sent(
    mesh: Mesh, counts: Sequence[int], dtype: torch.dtype, kind: type[Dispatch], holders: list[range]
) -> list[Tensor]:
    """What each rank gets back."""

    def program(comm: Comm) -> Tensor:
        x = rows_of(mesh.coordinate(comm.rank, "dp"), counts[mesh.coordinate(comm.rank, "dp")], dtype)
        shares = mesh.size if kind is Everywhere else 1
        made = Travelling(comm, holders, EXPERTS, CPU, TRAVEL) if kind is Travelling else kind(comm)
        return drain(made(x, counts, Toy(holders[comm.rank], shares)))

    results = as_threads(mesh, program)
    raise_first(results)
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("counts", [(5, 7), (1, 0), (0, 0), (8, 8)], ids=str)
@pytest.mark.parametrize(("dp", "ep"), [(2, 4), (2, 2), (1, 4)], ids=str)
def test_padded_is_travelling_to_the_bit(dp: int, ep: int, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    mesh = instance_mesh(4, dp=dp, ep=ep, all_to_all=True)
    each = EXPERTS // ep
    holders = [range(each * at, each * (at + 1)) for at in (mesh.coordinate(rank, "expert") for rank in range(4))]
    if ep < 4:  # the ranks of an expert hold a share of it each: here every second of them
        holders = [range(held.start + rank % 2, held.stop, 2) for rank, held in enumerate(holders)]
    counts = counts[:dp]
    padded, travelling, everywhere = (
        sent(mesh, counts, dtype, kind, holders) for kind in (Padded, Travelling, Everywhere)
    )
    for rank in range(4):
        assert torch.equal(padded[rank], travelling[rank])
        x = rows_of(mesh.coordinate(rank, "dp"), len(padded[rank]), dtype)
        one = Toy(range(EXPERTS))
        alone = one.joined(one.part(x, *one.route(x)), one.shared(x), x)
        tolerance = {torch.bfloat16: 2e-1, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
        torch.testing.assert_close(padded[rank], alone, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(everywhere[rank], alone, atol=tolerance, rtol=tolerance)


def test_all_ranks_choose_by_the_tokens_of_all() -> None:
    """A rank that looked at its own tokens alone would meet the others in another collective."""
    mesh = instance_mesh(2, dp=2, ep=2, all_to_all=True)
    chosen: list[tuple[int, str]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
            yield from ()
            chosen.append((sum(counts), self.name))
            return x

    for counts in ((4, 4), (4, 5), (9, 0)):
        for dp in range(2):
            form = BySize(8, Noted("padded"), Noted("counted")).chosen(sum(counts))
            drain(form(rows_of(dp, counts[dp], torch.float32), counts, Toy(())))
    assert chosen == [(8, "padded")] * 2 + [(9, "counted")] * 4

    def kinds(comm: Comm) -> tuple[type, type, int]:
        made = dispatch(comm, [range(4), range(4, 8)], EXPERTS, CPU, padded_up_to=8, carrier=TRAVEL)
        return type(made.small), type(made.large), made.most

    assert as_threads(mesh, kinds) == [(Padded, Travelling, 8)] * 2
