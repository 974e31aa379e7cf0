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

from tessera.comm.base import Comm, ordered_sum
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

    def whole(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """`part`, with this rank's share of what every token visits."""
        ...

    def shared(self, x: Tensor) -> Tensor | None:
        """This rank's share of what every token visits, x [R, hidden] -> [R, hidden]; None: there is no such thing."""
        ...

    def joined(self, part: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        """`part` with what `shared(x)` gave."""
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
        return (yield from self.together.home(experts.whole(x, *experts.route(x)), counts))


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

    def __init__(self, comm: Comm, holders: Sequence[Sequence[int]], num_experts: int, device: torch.device) -> None:
        self.comm = comm
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
        wanted = self.holds[:, ids].any(-1)  # [ranks, tokens]
        num_sent = wanted.sum(1)
        ones = [1] * len(num_sent)
        counting = self.comm.exchange(num_sent, "tp", ones, ones)
        _, tokens = wanted.nonzero(as_tuple=True)
        packed = _pack(mine[tokens], ids[tokens], scores[tokens])
        shared = experts.shared(mine)
        num_received = yield counting
        sent, received = num_sent.tolist(), num_received.tolist()
        rows = yield self.comm.exchange(packed, "tp", sent, received)
        part = experts.part(*_unpack(rows, mine, ids, scores))
        back = yield self.comm.exchange(part, "tp", received, sent)
        most = min(len(sent), ids.shape[1] * self.holders_of_one)
        out = experts.joined(_sum_by_token(back, tokens, len(mine), most), shared, mine)
        return (yield self.comm.gather(out, "attn", 0, pieces))


def _pack(*columns: Tensor) -> Tensor:
    """Tensors of as many rows side by side as bytes, so that they travel as one."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns], 1)


def _unpack(rows: Tensor, *like: Tensor) -> list[Tensor]:
    """What `_pack` joined, with the widths and dtypes of `like`."""
    widths = [column.shape[1] * column.element_size() for column in like]
    # Copied, for the alignment: of a single row a slice calls itself contiguous, whatever its stride and its offset.
    parts = [part.clone(memory_format=torch.contiguous_format) for part in rows.split(widths, 1)]
    return [part.view(column.dtype) for part, column in zip(parts, like, strict=True)]


def _sum_by_token(rows: Tensor, tokens: Tensor, count: int, most: int) -> Tensor:
    """[count, hidden]: the rows of each of `count` tokens, at most `most`, added in the order in which they stand."""
    order = tokens.argsort(stable=True)
    tokens = tokens[order]
    nth = torch.arange(len(tokens), device=tokens.device) - torch.searchsorted(tokens, tokens)
    places = tokens.new_full((count, most), len(rows))  # the row of zeros
    places[tokens, nth] = order
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return ordered_sum([padded[column] for column in places.T])


@dataclass(frozen=True)
class BySize:
    """`small` for steps of up to `most` tokens in all DP ranks, `large` for others: all ranks choose alike."""

    most: int
    small: Dispatch
    large: Dispatch

    def __call__(self, x: Tensor, counts: Sequence[int], experts: Experts) -> Waits[Tensor]:
        """See `Dispatch`."""
        chosen = self.small if sum(counts) <= self.most else self.large
        return (yield from chosen(x, counts, experts))


def dispatch(
    comm: Comm, holders: Sequence[Sequence[int]], num_experts: int, device: torch.device, padded_up_to: int
) -> Dispatch:
    """As the mesh is made: tokens travel where shared experts are whole (`instance_mesh(all_to_all=True)`), padded in
    steps of up to `padded_up_to` tokens in all DP ranks."""
    if comm.mesh.size_of("shared") == comm.mesh.size_of("tp"):
        return Everywhere(comm)
    return BySize(padded_up_to, Padded(comm), Travelling(comm, holders, num_experts, device))
