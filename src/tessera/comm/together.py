"""How tokens come together: a part of the model is cut over a group of ranks that may join several attention groups.

Each attention group (a DP rank of the plan) has tokens of its own. Around a part of the model that ranks of several of
them share, their tokens are gathered, every rank computes its share of all, and the sums go home. All ranks know from
the step how many tokens each DP rank has (`counts`); one without tokens takes part with no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tessera.comm.base import Comm
from tessera.comm.waits import Waits
from tessera.core.mesh import even_lengths


class Together(Protocol):
    """The tokens of a group of ranks. `counts`: tokens of every DP rank of the instance in this step."""

    def bring(self, mine: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """mine [T, ...] of this DP rank -> those of all DP ranks of the group, in their order."""
        ...

    def home(self, parts: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Waits[Tensor]:
        """This rank's share of a sum, for all tokens of the group -> the sum [T, ...] for those of this DP rank.

        It is rounded once, to `dtype`. The share is given away, as to `Comm.sum`.
        """
        ...

    def own(self, parts: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """What this rank has for all tokens of the group -> [members, T, ...] for those of this DP rank, from this
        rank's like in every attention group."""
        ...


class Within:
    """A group inside one attention group: all of its ranks have the same tokens."""

    def __init__(self, comm: Comm, group: str) -> None:
        self.comm, self.group = comm, group

    def bring(self, mine: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """See `Together`. Nothing travels."""
        yield from ()
        return mine

    def home(self, parts: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Waits[Tensor]:
        """See `Together`."""
        return (yield self.comm.sum([parts], self.group, dtype))

    def own(self, parts: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """See `Together`. Nothing travels."""
        yield from ()
        return parts[None]


class Across:
    """A group that joins whole attention groups.

    Home by a reduce-scatter in which each rank of an attention group gets a part of its tokens, and a gather among
    them: so every sum is taken over the whole group at once, and rounded once.
    """

    def __init__(self, comm: Comm, group: str) -> None:
        self.comm, self.group = comm, group
        self.mesh, self.across, self.within = comm.mesh, f"{group}/dp", f"{group}/attn"
        self.members = [self.mesh.coordinate(r, "dp") for r in self.mesh.group(comm.rank, self.across)]
        self.at = self.mesh.coordinate(comm.rank, self.across)

    def bring(self, mine: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """See `Together`."""
        return (yield self.comm.gather(mine, self.across, 0, self._lengths(counts)))

    def home(self, parts: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Waits[Tensor]:
        """See `Together`."""
        pieces = [even_lengths(length, self.mesh.size_of(self.within)) for length in self._lengths(counts)]
        mine = yield self.comm.scatter_sum([parts], self.group, 0, [n for piece in pieces for n in piece], dtype)
        return (yield self.comm.gather(mine, self.within, 0, pieces[self.at]))

    def own(self, parts: Tensor, counts: Sequence[int]) -> Waits[Tensor]:
        """See `Together`."""
        lengths = self._lengths(counts)
        mine, members = lengths[self.at], len(lengths)
        rows = yield self.comm.exchange(parts, self.across, lengths, [mine] * members)
        return rows.unflatten(0, (members, mine))

    def _lengths(self, counts: Sequence[int]) -> list[int]:
        return [counts[dp] for dp in self.members]


def together(comm: Comm, group: str) -> Together:
    """The tokens of mesh axis `group` ("tp", "dense" or "vocab") on this rank."""
    return Across(comm, group) if comm.mesh.size_of(f"{group}/dp") > 1 else Within(comm, group)
