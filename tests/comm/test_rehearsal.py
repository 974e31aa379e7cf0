"""Promise: a rank that rehearses alone holds what it would hold among the others, and disturbs nobody."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.comm.local import LocalGroup
from tessera.comm.rehearsal import Rehearsing
from tessera.core.errors import DeadlineError
from tessera.core.mesh import instance_mesh

AXES = ("attn", "dp", "tp", "tp/dp", "tp/attn")
Call = Callable[[Comm], Tensor]


def calls(axis: str, lengths: list[int], width: int, dim: int, device: str = "cpu") -> list[Call]:
    """Each collective over an axis, whose coordinates have `lengths` rows (or columns)."""

    def block(n: int) -> Tensor:
        return torch.ones((n, width) if dim == 0 else (width, n), device=device)

    def own(comm: Comm) -> int:
        return lengths[comm.mesh.coordinate(comm.rank, axis)]

    def of_axis(comm: Comm) -> list[int]:
        return lengths[: comm.mesh.size_of(axis)]

    return [
        lambda comm: comm.sum([block(2), block(2)], axis).wait(),
        lambda comm: comm.gather(block(own(comm)), axis, dim, of_axis(comm)).wait(),
        lambda comm: comm.gather(block(3), axis, dim).wait(),
        lambda comm: comm.scatter_sum([block(sum(of_axis(comm)))], axis, dim, of_axis(comm)).wait(),
        lambda comm: comm.exchange(
            torch.ones(sum(of_axis(comm)), width, device=device),
            axis, of_axis(comm), [own(comm)] * comm.mesh.size_of(axis),
        ).wait(),
    ]  # fmt: skip


@given(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]), st.booleans(), st.sampled_from(AXES),
    st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(1, 3), st.integers(0, 1),
)  # fmt: skip
def test_shapes_are_those_among_the_others(
    layout: tuple[int, int], all_to_all: bool, axis: str, lengths: list[int], width: int, dim: int
) -> None:
    """In a rehearsal, and on tensors without memory."""
    mesh = instance_mesh(layout[0], layout[1], dense_tp=layout[0], all_to_all=all_to_all)
    meeting = LocalGroup(mesh)
    comms = [Rehearsing(meeting.comm(rank)) for rank in range(mesh.size)]

    def shapes(comm: Comm, device: str = "cpu") -> list[tuple[tuple[int, ...], torch.dtype]]:
        found = (call(comm) for call in calls(axis, lengths, width, dim, device))
        return [(tuple(one.shape), one.dtype) for one in found]

    alone = []
    for comm in comms:
        with comm.alone():
            alone.append(shapes(comm))
    meeting.check()
    with ThreadPoolExecutor(mesh.size) as pool:
        assert list(pool.map(shapes, comms)) == alone
    meeting.check()
    assert [shapes(Alone(mesh, rank), "meta") for rank in range(mesh.size)] == alone


def test_an_error_in_a_rehearsal_ends_it() -> None:
    comm = Rehearsing(LocalGroup(instance_mesh(2), deadline_s=0.05).comm(0))
    x = torch.arange(3.0)
    try:
        with comm.alone():
            assert comm.exchange(x, "tp", [2, 1], [2, 2]).wait().tolist() == [0, 0, 0, 0]
            raise torch.OutOfMemoryError("none left")
    except torch.OutOfMemoryError:
        pass
    with pytest.raises(DeadlineError):
        comm.exchange(x, "tp", [2, 1]).wait()


def test_the_only_rank_gets_what_it_brings() -> None:
    comm, x = Alone(), torch.arange(3.0)
    found = (comm.sum([x, x], "tp"), comm.gather(x, "tp", 0), comm.scatter_sum([x, x], "tp", 0, [3]))
    assert [handle.wait().tolist() for handle in found] == [[0, 2, 4], [0, 1, 2], [0, 2, 4]]
    assert comm.exchange(x, "tp", [3]).wait().tolist() == [0, 1, 2]
