"""Collectives that a rank may leave out for a while, to find out alone whether there is memory for what is around them.

What fails in the middle of a step leaves the others waiting. So a step of a new kind is rehearsed first: everything but
the others, on tensors of the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tessera.comm.base import Comm, Handle, Ready, ordered_sum
from tessera.core.errors import DeadlineError
from tessera.core.mesh import Mesh


class Rehearsing:
    """The collectives of `comm`; inside `alone` results of the same shape, whose numbers mean nothing."""

    def __init__(self, comm: Comm) -> None:
        self.mesh: Mesh = comm.mesh
        self.rank: int = comm.rank
        self._together = self._now = comm
        self._alone = _Alone(comm.mesh, comm.rank)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody is asked, and nobody waits."""
        self._now = self._alone
        try:
            yield
        finally:
            self._now = self._together

    def sum(self, parts: Sequence[Tensor], axis: str) -> Handle:
        """See `Comm.sum`."""
        return self._now.sum(parts, axis)

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """See `Comm.gather`."""
        return self._now.gather(part, axis, dim, lengths)

    def scatter_sum(self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int]) -> Handle:
        """See `Comm.scatter_sum`."""
        return self._now.scatter_sum(parts, axis, dim, lengths)

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """See `Comm.exchange`."""
        return self._now.exchange(part, axis, sent, received)

    def forget(self) -> None:
        """See `Comm.forget`."""
        self._together.forget()

    def fault(self) -> DeadlineError | None:
        """See `Comm.fault`."""
        return self._together.fault()

    def close(self) -> None:
        """See `Comm.close`."""
        self._together.close()


class _Alone:
    """Shapes of a rank's collectives, and as much memory: what would come from others is zero."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.rank = mesh, rank

    def sum(self, parts: Sequence[Tensor], axis: str) -> Handle:
        return Ready(ordered_sum(parts))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        members = self.mesh.size_of(axis)
        found = [part.shape[dim]] * members if lengths is None else list(lengths)
        found[self.mesh.coordinate(self.rank, axis)] = 0
        pieces = [part.new_zeros(*part.shape[:dim], n, *part.shape[dim + 1 :]) for n in found if n]
        return Ready(torch.cat([part, *pieces], dim))

    def scatter_sum(self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int]) -> Handle:
        at = self.mesh.coordinate(self.rank, axis)
        whole = ordered_sum(parts)
        return Ready(whole.narrow(dim, sum(lengths[:at]), lengths[at]).clone())

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        return Ready(part.new_zeros(sum(sent if received is None else received), *part.shape[1:]))

    def forget(self) -> None:
        """Nothing was begun with others."""

    def fault(self) -> None:
        """Nobody is waited for."""

    def close(self) -> None:
        """Nobody to leave."""
