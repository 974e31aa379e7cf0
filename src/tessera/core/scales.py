"""Scales of fp8 tiles, derived from the layout: which stored blocks a tile touches, and where in it they begin.

Otherwise fp8 answers would depend on the layout. Block formats: DeepSeek-V3 technical report (arXiv 2412.19437), 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim


@dataclass(frozen=True, slots=True)
class ScaleTile:
    """Scales of one tile along a dim: one per `step` elements of the tile, and the stored block each repeats.

    `blocks[i]` is (tensor, block) of the elements `i * step .. i * step + step - 1` of the tile.
    """

    step: int
    blocks: tuple[tuple[str, int], ...]


def scale_tile(dim: Dim, size: int, rank: int, block: int = 128, least: int = 16) -> ScaleTile:
    """Scales of the part of coordinate `rank` when the checkpoint is quantised in blocks of `block` stored elements.

    A cut inside a block (704 columns are 5.5 blocks of 128) repeats scales at the common divisor of all borders that
    any rank sees, so that every shard dequantises to the bit as the whole does; nothing is requantised. Raises
    `LayoutError` when that divisor is below `least`, the finest step a kernel takes.
    """
    step = gcd(block, *(at for r in range(size) for at, _, _ in _borders(dim, size, r, block)))
    if step < least:
        raise LayoutError(
            f"dim '{dim.name}': cut for {size} ranks its blocks of {block} meet only every {step} elements; "
            f"scales can repeat at {least} or more, so use fewer ranks"
        )
    borders = _borders(dim, size, rank, block)
    ends = [at for at, _, _ in borders[1:]] + [dim.local_length(size, rank)]
    blocks: list[tuple[str, int]] = []
    for (at, tensor, number), end in zip(borders, ends, strict=True):
        blocks += [(tensor, number)] * -((at - end) // step)
    return ScaleTile(step, tuple(blocks))


def _borders(dim: Dim, size: int, rank: int, block: int) -> list[tuple[int, str, int]]:
    """(place in the tile, tensor, stored block) wherever a stored block begins in the tile."""
    borders: list[tuple[int, str, int]] = []
    for run in dim.stored(size, rank):
        numbers = range(run.start // block, -(-(run.start + run.length) // block))
        borders += [(run.local + max(n * block - run.start, 0), run.tensor, n) for n in numbers]
    return borders


def check_groups(dim: Dim, size: int, group: int = 128) -> None:
    """Raises `LayoutError` unless groups of `group` neighbours in every part are groups of the whole dim.

    Activations quantised per 1 x `group` on a rank are those of one device only then; else fp8 answers depend on TP.
    """
    for rank in range(size):
        for run in dim.held(size, rank):
            inside = run.start % group or run.local % group
            if inside or (run.length % group and run.start + run.length != dim.length):
                raise LayoutError(
                    f"dim '{dim.name}' of {dim.length}: rank {rank} of {size} holds elements {run.start} to "
                    f"{run.start + run.length - 1}, which cuts a group of {group}; use fewer ranks"
                )
