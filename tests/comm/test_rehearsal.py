"""Promise: a rank that rehearses alone holds what it would hold among the others, and disturbs nobody."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tessera.comm.base import Comm
from tessera.comm.local import LocalGroup
from tessera.comm.rehearsal import Rehearsing
from tessera.comm.single import SingleComm
from tessera.core.mesh import instance_mesh

AXES = ("attn", "dp", "tp", "tp/dp", "tp/attn")
Call = Callable[[Comm], Tensor]


def calls(axis: str, lengths: list[int], width: int, dim: int) -> list[Call]:
    """Each collective over an axis, whose coordinates have `lengths` rows (or columns)."""

    def block(n: int) -> Tensor:
        return torch.ones((n, width) if dim == 0 else (width, n))

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
            torch.ones(sum(of_axis(comm)), width), axis, of_axis(comm), [own(comm)] * comm.mesh.size_of(axis)
        ).wait(),
    ]


@given(
    st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]), st.sampled_from(AXES),
    st.lists(st.integers(0, 3), min_size=4, max_size=4), st.integers(1, 3), st.integers(0, 1),
)  # fmt: skip
def test_shapes_are_those_among_the_others(
    layout: tuple[int, int], axis: str, lengths: list[int], width: int, dim: int
) -> None:
    mesh = instance_mesh(layout[0], layout[1], dense_tp=layout[0])
    meeting = LocalGroup(mesh)
    comms = [Rehearsing(meeting.comm(rank)) for rank in range(mesh.size)]
    made = calls(axis, lengths, width, dim)

    def shapes(comm: Rehearsing) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(tuple(found.shape), found.dtype) for found in (call(comm) for call in made)]

    alone = []
    for comm in comms:
        with comm.alone():
            alone.append(shapes(comm))
    meeting.check()
    with ThreadPoolExecutor(mesh.size) as pool:
        assert list(pool.map(shapes, comms)) == alone
    meeting.check()


def test_an_error_in_a_rehearsal_ends_it() -> None:
    comm = Rehearsing(SingleComm())
    x = torch.arange(3.0)
    try:
        with comm.alone():
            assert comm.exchange(x, "tp", [3]).wait().tolist() == [0, 0, 0]
            raise torch.OutOfMemoryError("none left")
    except torch.OutOfMemoryError:
        assert comm.exchange(x, "tp", [3]).wait().tolist() == [0, 1, 2]
