"""Collectives without the others: for a dry run of the layers on tensors that have nothing but a shape ("meta")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tessera.comm.base import Handle, Ready, ordered_sum
from tessera.core.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Alone:
    """The `Comm` of `rank` of `mesh`, of which no other rank is there: a result has the shape that it would have."""

    mesh: Mesh
    rank: int = 0

    def sum(self, parts: Sequence[Tensor], axis: str) -> Handle:
        """The rank's own share."""
        return Ready(ordered_sum(parts))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """Room for the parts of the group."""
        if lengths is None:
            lengths = [part.shape[dim]] * self.mesh.size_of(axis)
        return Ready(_like(part, dim, sum(lengths)))

    def scatter_sum(self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int]) -> Handle:
        """Room for what this rank keeps."""
        return Ready(_like(parts[0], dim, lengths[self.mesh.coordinate(self.rank, axis)]))

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """Room for the rows that would come. Who does not know how many is alone for good."""
        assert received is not None, "rows that are counted first cannot be known alone"
        return Ready(_like(part, 0, sum(received)))

    def close(self) -> None:
        """Nobody to leave."""


def _like(part: Tensor, dim: int, length: int) -> Tensor:
    shape = list(part.shape)
    shape[dim] = length
    return part.new_empty(shape)
