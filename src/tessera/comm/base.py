"""Collectives behind one protocol. A call starts one and returns a `Handle`; layers yield it and get the tensor back.

Every sum across ranks goes through `Comm.sum` (or `scatter_sum`), which takes ordered parts, normally one a rank: the
order of addition is that of ranks and then parts, so that a deterministic mode can pin it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tessera.core.errors import DeadlineError
from tessera.core.mesh import Mesh

Dtype = torch.dtype | None  # of a sum: None is that of its parts


class Handle(Protocol):
    """A collective under way. It owns its buffers until `wait` returns."""

    def wait(self) -> Tensor:
        """The result. Raises `DeadlineError` when the others do not come in time, `PeerError` when one failed."""
        ...


class Comm(Protocol):
    """The collectives of rank `rank` of `mesh`. All ranks of an axis's group call the same ones in the same order."""

    @property
    def mesh(self) -> Mesh:
        """The ranks."""
        ...

    @property
    def rank(self) -> int:
        """This one."""
        ...

    def sum(self, parts: Sequence[Tensor], axis: str, dtype: Dtype = None) -> Handle:
        """Sum over the group of the ordered `parts` of each rank, all of one shape, in fp32 or wider, rounded once.

        `dtype`: what it is rounded to; the parts may be wider, since what is rounded before it is added up makes a sum
        depend on how it was cut. The parts are given away: they may be written to, since the fastest sums on GPUs work
        in place.
        """
        ...

    def gather(self, part: Tensor, axis: str, dim: int, lengths: Sequence[int] | None = None) -> Handle:
        """The parts of the group side by side along `dim`, in order of coordinate; their lengths there may differ.

        `lengths` by coordinate: whoever knows them says so, else ranks that share no memory ask each other first.
        """
        ...

    def scatter_sum(
        self, parts: Sequence[Tensor], axis: str, dim: int, lengths: Sequence[int], dtype: Dtype = None
    ) -> Handle:
        """`sum`, of which coordinate c keeps `lengths[c]` neighbouring elements along `dim`."""
        ...

    def exchange(self, part: Tensor, axis: str, sent: Sequence[int], received: Sequence[int] | None = None) -> Handle:
        """Sends the first `sent[0]` rows of `part` to coordinate 0, the next `sent[1]` to coordinate 1 and so on.

        Gives the rows that came, in order of coordinate. `received[c]`: how many come from c; whoever knows says so,
        else ranks that share no memory ask each other first, and the host waits.
        """
        ...

    def forget(self) -> None:
        """What was begun and not waited for never will be: it was to be recorded, has not run, and is thrown away."""
        ...

    def fault(self) -> DeadlineError | None:
        """Why the device has failed, if it did so in a collective: naming who did not come, and the deadline."""
        ...

    def close(self) -> None:
        """Leaves for good. Ranks that wait for something this one has not brought get a `PeerError`."""
        ...


@dataclass(frozen=True, slots=True)
class Ready:
    """The handle of a collective that was over at once."""

    value: Tensor

    def wait(self) -> Tensor:
        """The result."""
        return self.value


def ordered_sum(parts: Sequence[Tensor], dtype: Dtype = None) -> Tensor:
    """The sum from first to last, in fp32 or wider, rounded once to `dtype` (the parts'). One part is itself."""
    first, *others = parts
    dtype = dtype or first.dtype
    if not others:
        return first.to(dtype)
    shape = first.shape
    assert all(part.shape == shape for part in others), f"one sum of {[tuple(part.shape) for part in parts]}"
    if len(others) == 1 and dtype == first.dtype:
        return first + others[0]  # narrower ones are added in fp32 too, and rounded once: one launch
    total = first.to(torch.promote_types(first.dtype, torch.float32)) + others[0]
    for part in others[1:]:
        total += part
    return total.to(dtype)
