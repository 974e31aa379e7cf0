"""Collectives that a rank may leave out for a while, to find out alone whether there is memory for what is around them.

What fails in the middle of a step leaves the others waiting. So a step of a new kind is rehearsed first: everything but
the others, on tensors of the same shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Comm, Dtype, Handle
from tessera.core.errors import DeadlineError
from tessera.core.mesh import Mesh


class Rehearsing:
    """The collectives of `comm`; inside `alone` results of the same shape, whose numbers mean nothing."""

    def __init__(self, comm: Comm) -> None:
        self.mesh: Mesh = comm.mesh
        self.rank: int = comm.rank
        self._together = self._now = comm
        self._alone = Alone(comm.mesh, comm.rank)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody is asked, and nobody waits."""
        self._now = self._alone
        try:
            yield
        finally:
            self._now = self._together

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """See `Comm.sum`."""
        return self._now.sum(parts, axis, dtype)

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """See `Comm.gather`."""
        return self._now.gather(part, axis, dim, lengths)

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """See `Comm.scatter_sum`."""
        return self._now.scatter_sum(parts, axis, dim, lengths, dtype)

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
