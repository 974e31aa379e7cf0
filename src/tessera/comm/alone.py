"""Collectives of one rank: of the only one, or of one of several that runs its layers without the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.comm.base import Dtype, Handle, Ready, ordered_sum
from tessera.core.mesh import SINGLE, Mesh


@dataclass(frozen=True, slots=True)
class Alone:
    """The `Comm` of `rank` of `mesh` along axes on which it has nobody beside it.

    Along the others: results of the same shapes, which take as much memory, with zeros for what would come from others.
    """

    mesh: Mesh = SINGLE
    rank: int = 0

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """The rank's own share."""
        return Ready(ordered_sum(parts, dtype))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """The part itself, and zeros."""
        members = self.mesh.size_of(axis)
        if members == 1:
            return Ready(part)
        found = [part.shape[dim]] * members if lengths is None else list(lengths)
        found[self.mesh.coordinate(self.rank, axis)] = 0
        pieces = [part.new_zeros(*part.shape[:dim], n, *part.shape[dim + 1 :]) for n in found if n]
        return Ready(torch.cat([part, *pieces], dim))

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """What it keeps of its own share."""
        at, whole = self.mesh.coordinate(self.rank, axis), ordered_sum(parts, dtype)
        assert whole.shape[dim] == sum(lengths), f"{whole.shape[dim]} elements to cut into {lengths}"
        kept = whole.narrow(dim, sum(lengths[:at]), lengths[at])
        return Ready(whole if len(lengths) == 1 else kept.clone())

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """The part itself; zeros where others are, as many as it sends where nobody knows how many come."""
        assert len(part) == sum(sent), f"{len(part)} rows to cut into {sent}"
        if self.mesh.size_of(axis) == 1:
            return Ready(part)
        return Ready(part.new_zeros(sum(sent if received is None else received), *part.shape[1:]))

    def forget(self) -> None:
        """Nothing is ever under way."""

    def fault(self) -> None:
        """See `Comm.fault`. Nobody is waited for."""

    def close(self) -> None:
        """Nobody to leave."""
