"""The copies that turn one layout of a tensor into another: every destination element once, from the right source.

Pure: layouts and meshes in, boxes or runs of elements out. Where parallel sizes do not divide each other, where heads
are replicated on either side and where a part packs several sections, the same few lines hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import TypeVar

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim, Layout, Run
from tessera.core.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """`length` elements along one dim: `src` in the source's tile, `dst` in the destination's."""

    src: int
    dst: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A box that moves from the tile of rank `src` to the tile of rank `dst`: one span per dim."""

    src: int
    dst: int
    box: tuple[Span, ...]


def reshard(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int = 0) -> list[Copy]:
    """Copies that fill every tile of `dst` from the tiles of `src`: each destination element once.

    Both describe the same whole tensor, perhaps on meshes of different sizes. Where several source ranks hold what
    several destinations need, neighbours serve neighbours; where there are more sources than that, tensors of one
    kind, counted by `turn`, use them all. Raises `LayoutError` when the two are not the same tensor.
    """
    same_tensor(src, dst)
    src.check(src_mesh)
    dst.check(dst_mesh)
    sources = [
        _sources(_holders(a, src_mesh.size_of(a.axis)), b, dst_mesh.size_of(b.axis), turn)
        for a, b in zip(src.dims, dst.dims, strict=True)
    ]
    copies = []
    for rank in range(dst_mesh.size):
        at = [dst_mesh.coordinate(rank, dim.axis) for dim in dst.dims]
        twins = _ranks_at(dst, dst_mesh, at)
        for picks in product(*(found[c] for found, c in zip(sources, at, strict=True))):
            ranks = _ranks_at(src, src_mesh, [coordinate for coordinate, _ in picks])
            holder = _share(ranks, twins.index(rank), len(twins), turn)
            copies.append(Copy(holder, rank, tuple(span for _, span in picks)))
    return copies


def same_tensor(src: Layout, dst: Layout) -> None:
    """Raises `LayoutError` when the two are not layouts of one whole tensor."""

    def real(layout: Layout) -> list[list[tuple[str, int, int]]]:
        return [[(s.name, s.units - s.padding, s.width) for s in d.sections] for d in layout.dims]

    if real(src) != real(dst):
        raise LayoutError(f"not the same tensor: source {real(src)}, destination {real(dst)}")
    for a, b in zip(src.dims, dst.dims, strict=True):
        if len(a.sections) > 1 and [s.padding for s in a.sections] != [s.padding for s in b.sections]:
            raise LayoutError(f"dim '{a.name}': sections padded differently cannot be compared")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of a source dim that the same parts hold: each (coordinate, place in that part)."""

    start: int
    length: int
    holders: tuple[tuple[int, int], ...]


def _holders(dim: Dim, size: int) -> list[_Piece]:
    held = [(coordinate, run) for coordinate in range(size) for run in dim.held(size, coordinate)]
    borders = sorted({at for _, run in held for at in (run.start, run.start + run.length)})
    places: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for coordinate, run in held:
        inside = borders[bisect_left(borders, run.start) : bisect_left(borders, run.start + run.length) + 1]
        for low, high in pairwise(inside):
            places.setdefault((low, high), []).append((coordinate, run.local + low - run.start))
    return [_Piece(low, high - low, tuple(places[low, high])) for low, high in sorted(places)]


def _sources(pieces: list[_Piece], dim: Dim, size: int, turn: int) -> list[list[tuple[int, Span]]]:
    """For each coordinate of the destination: (coordinate of the source, span) pairs that cover its part once."""
    held = [dim.held(size, coordinate) for coordinate in range(size)]
    spans: list[list[tuple[int, Span]]] = [[] for _ in held]
    for piece in pieces:
        met = {taker: [span for run in runs if (span := _common(piece, run))] for taker, runs in enumerate(held)}
        takers = [taker for taker, found in met.items() if found]
        for place, taker in enumerate(takers):
            coordinate, local = _share(piece.holders, place, len(takers), turn)
            spans[taker] += [(coordinate, Span(local + s.src, s.dst, s.length)) for s in met[taker]]
    return [_joined_spans(found) for found in spans]


def _common(piece: _Piece, run: Run) -> Span | None:
    """What a run has of a piece; the source counts from the start of the piece."""
    low, high = max(piece.start, run.start), min(piece.start + piece.length, run.start + run.length)
    return Span(low - piece.start, run.local + low - run.start, high - low) if low < high else None


def _share(holders: Sequence[T], place: int, takers: int, turn: int) -> T:
    """Who serves the taker at `place` among `takers`: neighbours serve neighbours, several of them take turns."""
    first = place * len(holders) // takers
    end = max((place + 1) * len(holders) // takers, first + 1)
    return holders[first + turn % (end - first)]


def _joined_spans(spans: list[tuple[int, Span]]) -> list[tuple[int, Span]]:
    joined: list[tuple[int, Span]] = []
    for coordinate in sorted({c for c, _ in spans}):
        joined += [(coordinate, s) for s in merged(s for c, s in spans if c == coordinate)]
    return joined


def _ranks_at(layout: Layout, mesh: Mesh, coordinates: list[int]) -> list[int]:
    """The ranks at these coordinates of the axes along which the dims are cut."""
    wanted = [(d.axis, c) for d, c in zip(layout.dims, coordinates, strict=True) if d.axis is not None]
    return [r for r in range(mesh.size) if all(mesh.coordinate(r, axis) == c for axis, c in wanted)]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same moves with neighbours joined: runs that follow each other in both source and destination."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: s.dst):
        if out and out[-1].dst + out[-1].length == span.dst and out[-1].src + out[-1].length == span.src:
            out[-1] = Span(out[-1].src, out[-1].dst, out[-1].length + span.length)
        else:
            out.append(span)
    return out


def flat(box: tuple[Span, ...], src_shape: tuple[int, ...], dst_shape: tuple[int, ...]) -> list[Span]:
    """The box as runs of elements of two row-major tiles, merged."""
    if not box:
        return [Span(0, 0, 1)]
    while len(box) > 1 and (box[-1].length == src_shape[-1] == dst_shape[-1]):  # whole rows are runs themselves
        *outer, last, row = box
        box = (*outer, Span(last.src * row.length, last.dst * row.length, last.length * row.length))
        src_shape = (*src_shape[:-2], src_shape[-2] * src_shape[-1])
        dst_shape = (*dst_shape[:-2], dst_shape[-2] * dst_shape[-1])
    src_strides = [prod(src_shape[i + 1 :]) for i in range(len(box))]
    dst_strides = [prod(dst_shape[i + 1 :]) for i in range(len(box))]
    spans = []
    for index in product(*(range(s.length) for s in box[:-1])):
        src = sum((s.src + i) * stride for s, i, stride in zip(box, index, src_strides, strict=False))
        dst = sum((s.dst + i) * stride for s, i, stride in zip(box, index, dst_strides, strict=False))
        spans.append(Span(src + box[-1].src, dst + box[-1].dst, box[-1].length))
    return merged(spans)
