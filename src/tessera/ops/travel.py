"""Tokens on their way to the ranks that hold their experts: which goes where, as rows of bytes, and what comes back.

The plain twins of `triton_travel.py`. T tokens, W ranks, k experts a token, E experts, H hidden. Rows for the first
rank stand first, those of a rank in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tessera.ops.precision import wide

ALIGNED = 16  # bytes: where a column of a row may begin


class Places(NamedTuple):
    """`nth` [W, T] int32: which of the rows for a rank a token's is; -1: it does not go there. `counts` [W] int64."""

    nth: Tensor
    counts: Tensor


class Columns(NamedTuple):
    """Where in the bytes of a row `x` [H], `scores` [k] and `ids` [k] int32 begin, and how long a row is."""

    scores: int
    ids: int
    width: int


def columns_of(x: Tensor, scores: Tensor) -> Columns:
    """For rows of x [T, H] and scores [T, k]."""
    after_x = aligned(x.shape[1] * x.element_size())
    after_scores = after_x + aligned(scores.shape[1] * scores.element_size())
    return Columns(after_x, after_scores, after_scores + aligned(4 * scores.shape[1]))


def aligned(size: int) -> int:
    """`size` bytes, rounded up."""
    return -(-size // ALIGNED) * ALIGNED


def places_reference(ids: Tensor, holds: Tensor) -> Places:
    """ids [T, k], holds [W, E] bool: a token goes once to each rank that holds one of its experts."""
    wanted = holds[:, ids].any(-1)
    nth = torch.where(wanted, wanted.cumsum(1) - 1, -1)
    return Places(nth.int(), wanted.sum(1))


def pack_reference(x: Tensor, ids: Tensor, scores: Tensor, places: Places, most: int) -> Tensor:
    """[T * most, width] uint8: the rows of x [T, H] with their ids and scores [T, k], a token's at most `most`.

    What follows the last row is not written.
    """
    columns = columns_of(x, scores)
    rows = torch.zeros(len(x) * most, columns.width, dtype=torch.uint8, device=x.device)
    at, (_, tokens) = _rows(places), (places.nth >= 0).nonzero(as_tuple=True)
    parts = unpack(rows, x, scores)
    for part, column in zip(parts, (x, ids.int(), scores), strict=True):
        part[at] = column[tokens]
    return rows


def unpack(rows: Tensor, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [R, width] of `pack` -> x [R, H], ids [R, k] int32 and scores [R, k], with the dtypes of `x` and `scores`.

    Views: rows have gaps between them.
    """
    columns, k = columns_of(x, scores), scores.shape[1]

    def part(first: int, number: int, dtype: torch.dtype) -> Tensor:
        return rows[:, first : first + number * dtype.itemsize].view(dtype)

    return (
        part(0, x.shape[1], x.dtype),
        part(columns.ids, k, torch.int32),
        part(columns.scores, k, scores.dtype),
    )


def collect_reference(back: Tensor, places: Places) -> Tensor:
    """[T, H]: the rows of back [R, H] of each token, added in the order of ranks in fp32 or wider, rounded once."""
    total = torch.zeros(places.nth.shape[1], back.shape[1], dtype=wide(back.dtype), device=back.device)
    for rows, nth in zip(back.split(places.counts.tolist()), places.nth, strict=True):
        goes = nth >= 0
        total[goes] += rows[nth[goes]]
    return total.to(back.dtype)


def _rows(places: Places) -> Tensor:
    """Where each row is among all, in order."""
    first = places.counts.cumsum(0) - places.counts
    return (places.nth + first[:, None])[places.nth >= 0]


@dataclass(frozen=True, slots=True)
class Travel:
    """One version of each."""

    places: Callable[[Tensor, Tensor], Places]
    pack: Callable[[Tensor, Tensor, Tensor, Places, int], Tensor]
    collect: Callable[[Tensor, Places], Tensor]
    unpack: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = unpack


TRAVEL = Travel(places_reference, pack_reference, collect_reference)
