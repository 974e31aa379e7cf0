"""How the work of a step is cut into programs: from padded sizes on the host, from a batch's lengths on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.triton_common import num_processors

MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and keys of a tile, and how a program runs: warps, and loads that are under way at once (stages)."""

    m: int
    n: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """The keywords of a kernel's launch."""
        return {"M": self.m, "N": self.n, "num_warps": self.warps, "num_stages": self.stages}


def tiles_of(segments: Segments, group: int, m: int, above: int) -> Tensor:
    """[number, 2] int32: segment and block of each tile of `m` rows of the ranges longer than `above`; -1: no tile.

    `group` rows a token. Their number is a bound that follows from S and T; those that begin late in a sequence, the
    longest, come first. Made on the device, once per step.
    """
    return segments.once(("tiles", group, m, above), lambda: _tiles(segments, group, m, above))


def _tiles(segments: Segments, group: int, m: int, above: int) -> Tensor:
    num_tokens = segments.num_tokens
    bound = num_tokens * group // m + min(segments.num_segments, num_tokens // (above + 1))
    lengths = segments.lengths
    counts = torch.where(lengths > above, (lengths * group + m - 1) // m, 0)
    ends = counts.cumsum(0)
    tile = ends[-1] - 1 - torch.arange(bound, device=segments.device)
    segment = torch.searchsorted(ends, tile, right=True).clamp_(max=segments.num_segments - 1)
    block = tile - (ends - counts)[segment]
    return torch.stack((torch.where(tile < 0, -1, segment), block), 1).int()


def splits_of(segments: Segments, programs: int, n: int, waves: int, any_length: bool = False) -> int:
    """Splits of a sequence's keys, from static sizes: `programs` without splits, tiles of n keys. A power of two.

    `any_length`: as many as there could be if sequences were longer.

    Kernels that join them are compiled for how many they have room for: steps that run without a graph are of any size,
    and would stall for seconds at each number that comes for the first time.
    """
    wanted = waves * num_processors(segments.device) // max(programs, 1)
    most = MAX_SPLITS if any_length else triton.cdiv(segments.page_table.shape[1] * segments.page_size, n)
    return 1 << (max(1, min(wanted, most, MAX_SPLITS)).bit_length() - 1)


def result(segments: Segments, like: Tensor, *shape: int) -> Tensor:
    """A tensor [T, ...] for kernels to write: zeros where tokens of no range may be, whose rows nobody writes.

    What such a row holds goes on through the layers, and a NaN must not meet what sorts or counts rows.
    """
    every_token_has_a_range = segments.known or segments.max_length == 1
    return like.new_empty(shape) if every_token_has_a_range else like.new_zeros(shape)
