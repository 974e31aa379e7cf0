"""Collectives of one rank: every group has one member, so a result is there at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tessera.comm.base import Dtype, Handle, Ready, ordered_sum
from tessera.core.mesh import SINGLE, Mesh


class SingleComm:
    """The `Comm` of an instance of one rank."""

    mesh: Mesh = SINGLE
    rank: int = 0

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """The sum of the rank's own parts."""
        return Ready(ordered_sum(parts, dtype))

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """The part itself."""
        return Ready(part)

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """The sum of the rank's own parts, all of it."""
        (length,) = lengths
        assert parts[0].shape[dim] == length, f"{parts[0].shape[dim]} elements to keep {length} of"
        return Ready(ordered_sum(parts, dtype))

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """The part itself."""
        assert [len(part)] == list(sent) == list(received or sent), f"{len(part)} rows, {sent} to send"
        return Ready(part)

    def forget(self) -> None:
        """Nothing is ever under way."""

    def fault(self) -> None:
        """See `Comm.fault`. Nobody is waited for."""

    def close(self) -> None:
        """Nobody to leave."""
