"""How tokens and experts meet: all tokens go everywhere, or each token goes only where its experts are.

T tokens of a DP rank, R rows that came to this rank, k experts a token, E experts. Shared experts that are whole on
every rank compute while tokens are on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tessera.comm.base import Comm
from tessera.comm.together import together
from tessera.comm.waits import Waits
from tessera.core.mesh import even_lengths


class Experts(Protocol):
    """What a rank computes of a mixture of experts, for any rows that it is given."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, hidden] -> the experts [R, k] by their number in the model, and their weights [R, k]."""
        ...

    def part(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """This rank's share of the weighted sum [R, hidden] of the chosen experts; those held elsewhere add nothing."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """`part` of the experts that `route` chooses, with this rank's share of what every token visits."""
        ...

    def shared(self, x: Tensor) -> Tensor | None:
        """This rank's share of what every token visits, x [R, hidden] -> [R, hidden]; None: there is no such thing."""
        ...

    def joined(self, part: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        """`part` with what `shared(x)` gave, in the dtype of x."""
        ...


class Places(Protocol):
    """Which token goes to which rank. `counts` [W]: how many go to each."""

    @property
    def counts(self) -> Tensor:
        """int64, on the device."""
        ...


class Carrier(Protocol):
    """Makes rows of tokens that go to other ranks, and sums of what comes back (`ops/travel.py`)."""

    def places(self, ids: Tensor, holds: Tensor) -> Places:
        """ids [T, k], holds [W, E] bool: a token goes once to each rank that holds one of its experts."""
        ...

    def pack(self, x: Tensor, ids: Tensor, scores: Tensor, places: Places, most: int) -> Tensor:
        """Rows of bytes [T * most, width], a token's at most `most`; those for the first rank stand first."""
        ...

    def unpack(self, rows: Tensor, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """rows [R, width] that came -> x [R, hidden], ids [R, k] and scores [R, k], as `x` and `scores` are here."""
        ...

    def collect(self, back: Tensor, places: Places) -> Tensor:
        """back [R, hidden], in the order of `pack` -> [T, hidden], added in the order of ranks."""
        ...


class Dispatch(Protocol):
    """Brings tokens to experts and the sums home. `counts`: tokens of every DP rank."""

    def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
        """x [T, hidden] of this DP rank -> [T, hidden]."""
        ...


class Everywhere:
    """Every rank sees the tokens of all; shared experts are cut over all ranks, and one sum adds all shares."""

    def __init__(self, comm: Comm) -> None:
        self.together = together(comm, "tp")

    def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
        """See `Dispatch`."""
        x = yield from self.together.bring(x, counts)
        return (yield from self.together.home(experts.whole(x), counts, x.dtype))


class Padded:
    """An exchange of one size, with room for the worst: that every token goes to every rank.

    With so much room a token's place at each rank is its own number, and nothing is left to count, to sort or to move
    to the front: going out is a gather, coming back a scattered sum, to which a rank without experts of a token adds
    zero. The host learns nothing, so a step can be recorded. A token goes once to each rank, and its experts are chosen
    where it arrives, which takes less time than to send the choice. Shared experts are whole, as in `Travelling`.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm, self.mesh = comm, comm.mesh
        self.at = comm.mesh.coordinate(comm.rank, "attn")
        self.dp = comm.mesh.coordinate(comm.rank, "dp")

    def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
        """See `Dispatch`."""
        pieces = [even_lengths(count, self.mesh.size_of("attn")) for count in counts]
        mine = x.split(pieces[self.dp])[self.at]
        coming = self.comm.gather(x, "tp/dp", 0, counts)
        shared = experts.shared(mine)
        everyone = yield coming
        part = experts.part(everyone, *experts.route(everyone))
        total = yield self.comm.scatter_sum([part], "tp", 0, [n for piece in pieces for n in piece])
        return (yield self.comm.gather(experts.joined(total, shared, mine), "attn", 0, pieces[self.dp]))


class Travelling:
    """A token goes to the ranks that hold its experts, once to each, and what they make of it comes back.

    The ranks of an attention group, which have the same tokens, send a part of them each. Shared experts are whole on
    every rank. How many rows travel is known only when the tokens are routed: the host waits for that.
    `holders`: the experts that each rank of the instance holds.
    """

    def __init__(
        self, comm: Comm, holders: Sequence[Sequence[int]], num_experts: int, device: torch.device, carrier: Carrier
    ) -> None:
        self.comm, self.carrier = comm, carrier
        self.at, self.size = comm.mesh.coordinate(comm.rank, "attn"), comm.mesh.size_of("attn")
        holds = torch.zeros(len(holders), num_experts, dtype=torch.bool)
        for rank, held in enumerate(holders):
            holds[rank, list(held)] = True
        self.holders_of_one = int(holds.sum(0).max())
        self.holds = holds.to(device)

    def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
        """See `Dispatch`."""
        pieces = even_lengths(len(x), self.size)
        mine = x.split(pieces)[self.at]
        ids, scores = experts.route(mine)
        places = self.carrier.places(ids, self.holds)
        ones = [1] * len(self.holds)
        counting = self.comm.exchange(places.counts, "tp", ones, ones)
        most = min(len(self.holds), ids.shape[1] * self.holders_of_one)
        packed = self.carrier.pack(mine, ids, scores, places, most)
        shared = experts.shared(mine)
        num_received = yield counting
        sent, received = _known(places.counts, len(packed)), _known(num_received, len(packed))
        rows = yield self.comm.exchange(packed[: sum(sent)], "tp", sent, received)
        part = experts.part(*self.carrier.unpack(rows, mine, scores))
        back = yield self.comm.exchange(part, "tp", received, sent)
        out = experts.joined(self.carrier.collect(back, places), shared, mine)
        return (yield self.comm.gather(out, "attn", 0, pieces))


def _known(counts: Tensor, most: int) -> list[int]:
    """Counts on the host, which waits for them; of tensors without memory as if all `most` rows went."""
    return list(even_lengths(most, len(counts))) if counts.is_meta else counts.tolist()


@dataclass(frozen=True)
class BySize:
    """`small` for steps of up to `most` tokens in all DP ranks, `large` for others: all ranks choose alike, and so do
    the halves of a step, which take their turns by stages (`comm/waits.py`)."""

    most: int
    small: Dispatch
    large: Dispatch

    def chosen(self, largest: int) -> Dispatch:
        """For a step whose largest half, or which whole, has so many tokens in all DP ranks."""
        return self.small if largest <= self.most else self.large


def dispatch(
    comm: Comm,
    holders: Sequence[Sequence[int]],
    num_experts: int,
    device: torch.device,
    padded_up_to: int,
    carrier: Carrier,
) -> BySize:
    """As the mesh is made: tokens travel where shared experts are whole (`instance_mesh(all_to_all=True)`), padded in
    steps of up to `padded_up_to` tokens in all DP ranks."""
    if comm.mesh.size_of("shared") == comm.mesh.size_of("tp"):
        return BySize(0, Everywhere(comm), Everywhere(comm))
    return BySize(padded_up_to, Padded(comm), Travelling(comm, holders, num_experts, device, carrier))
