"""Collectives without the others: a rank runs its layers alone, for the memory they take, or for what they launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.comm.base import Dtype, Handle, Ready, ordered_sum
from tessera.core.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Alone:
    """Shapes of the collectives of `rank` of `mesh`, and as much memory: what would come from others is zero."""

    mesh: Mesh
    rank: int = 0

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """The rank's own share."""
        return Ready(ordered_sum(parts, dtype))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """The rank's own part, and zeros."""
        members = self.mesh.size_of(axis)
        found = [part.shape[dim]] * members if lengths is None else list(lengths)
        found[self.mesh.coordinate(self.rank, axis)] = 0
        pieces = [part.new_zeros(*part.shape[:dim], n, *part.shape[dim + 1 :]) for n in found if n]
        return Ready(torch.cat([part, *pieces], dim))

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """What it keeps of its own share."""
        at = self.mesh.coordinate(self.rank, axis)
        whole = ordered_sum(parts, dtype)
        return Ready(whole.narrow(dim, sum(lengths[:at]), lengths[at]).clone())

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """Zeros; as many as it sends where nobody knows how many come."""
        return Ready(part.new_zeros(sum(sent if received is None else received), *part.shape[1:]))

    def forget(self) -> None:
        """Nothing was begun with others."""

    def fault(self) -> None:
        """Nobody is waited for."""

    def close(self) -> None:
        """Nobody to leave."""
