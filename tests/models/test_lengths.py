"""Promise: layers say how long the parts of a gather are, which all ranks know: asking would stop the host, and a CUDA
graph cannot record it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.harness import make_rank
from tessera.comm.base import Ready
from tessera.core.mesh import Mesh, instance_mesh
from tiny import TINY, tiny_model


class Told:
    """The collectives of a rank whose peers all have what it has; a gather must be told lengths."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.rank, self.gathers = mesh, 0, 0

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: torch.dtype | None = None) -> Ready:
        return Ready(parts[0])

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Ready:
        assert lengths is not None, f"a gather over '{axis}' asks for lengths"
        self.gathers += 1
        return Ready(torch.cat([part] * len(lengths), dim))


@pytest.mark.parametrize("name", TINY)
def test_gathers_are_told_lengths(name: str) -> None:
    tiny, mesh = tiny_model(name), instance_mesh(2)
    comm = Told(mesh)
    rank = make_rank(tiny.spec, tiny.source, mesh=mesh, comm=comm)  # type: ignore[arg-type]
    assert rank.run([(0, [5, 6, 7])]).shape == (3, tiny.spec.vocab_size)
    assert comm.gathers
