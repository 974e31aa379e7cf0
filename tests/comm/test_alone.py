"""Promise: a rank alone gets tensors of the shapes that it would get among the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comm.ranks import as_threads
from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.core.mesh import even_lengths, instance_mesh

MESHES = [instance_mesh(1), instance_mesh(2), instance_mesh(4, dp=2), instance_mesh(4, dp=4, ep=2, all_to_all=True)]


def shapes(comm: Comm, device: str) -> list[tuple[int, ...]]:
    """Of what each collective gives along each group of the model."""
    found: list[Any] = []
    for axis in ("attn", "tp", "tp/dp", "tp/attn"):
        size = comm.mesh.size_of(axis)
        at = comm.mesh.coordinate(comm.rank, axis)
        lengths = [3 + i for i in range(size)]
        mine, whole = torch.zeros(lengths[at], 5, device=device), torch.zeros(7, 5, device=device)
        kept, sent = even_lengths(7, size), [1 + (i + at) % 2 for i in range(size)]
        received = [1 + (at + i) % 2 for i in range(size)]
        found += [
            comm.sum([whole.clone()], axis),
            comm.gather(mine, axis, 0, lengths),
            comm.gather(whole, axis, 1),
            comm.scatter_sum([whole.clone()], axis, 0, kept),
            comm.exchange(torch.zeros(sum(sent), 2, device=device), axis, sent, received),
        ]
    return [tuple(handle.wait().shape) for handle in found]


@pytest.mark.parametrize("mesh", MESHES, ids=["1", "2", "4, dp 2", "4, dp 4, ep 2"])
def test_shapes_are_those_among_others(mesh: Any) -> None:
    together = as_threads(mesh, lambda comm: shapes(comm, "cpu"))
    assert [shapes(Alone(mesh, rank), "meta") for rank in range(mesh.size)] == together
