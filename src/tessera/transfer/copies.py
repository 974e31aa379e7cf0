"""The plan of copies: which bytes of which rank of a prefill server go where on which rank of a decode server.

All of it follows from the two manifests by `core/reshard.py`; there is no arithmetic of ratios. A `CopyPlan` is made
once for a pair of servers. Per request it turns page lists and slots into runs, in numpy, for the ranks of one DP group
of either side: the group that computed the prompt and the group that will continue it.

Pages are sent whole, each once: when its last token is computed, the last page of a prompt with the last chunk
(`plan/dp_rank.py` says which). Of a half-filled page the bytes behind the last token are sent along; nobody reads them,
and cutting them off would turn one run into one for each head of K and of V.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tessera.core.layout import Layout
from tessera.core.mesh import Axis, Mesh
from tessera.core.reshard import Span, flat, merged, reshard
from tessera.core.tensors import DTYPE_BYTES
from tessera.transfer.base import Runs
from tessera.transfer.manifest import Manifest, compare

Ints = NDArray[np.int64]
Pair = tuple[int, int]  # a source and a destination


class CopyPlan:
    """What moves between two servers. Ranks are those of their meshes. Raises `ConfigError` when they do not fit."""

    def __init__(self, source: Manifest, destination: Manifest) -> None:
        compare(source, destination)
        self._source, self._destination = _Side(source), _Side(destination)
        self._pages = self._templates("page")
        self._slots = self._templates("slot")
        self._pairs = sorted(self._pages.keys() | self._slots.keys())

    def pairs(self, src_dp: int, dst_dp: int) -> tuple[tuple[int, int], ...]:
        """(source rank, destination rank) of all that have something to copy between a DP group of either side."""
        src, dst = self._source.manifest.group(src_dp), self._destination.manifest.group(dst_dp)
        return tuple((src[a], dst[b]) for a, b in self._pairs)

    def readers(self, src_rank: int) -> tuple[int, ...]:
        """The destination ranks, of all DP groups, to which a source rank may have something to copy."""
        groups = range(self._destination.manifest.num_dp_ranks)
        src_dp = self._source.manifest.mesh.coordinate(src_rank, "dp")
        return tuple(sorted({b for group in groups for a, b in self.pairs(src_dp, group) if a == src_rank}))

    def paged(
        self, src_rank: int, dst_rank: int, src_pages: Sequence[int] | Ints, dst_pages: Sequence[int] | Ints
    ) -> Runs:
        """Copies of page `src_pages[i]` to page `dst_pages[i]`, in all caches, between two ranks.

        Neighbours in both lists join. ValueError for pages that are not there, or a destination named twice.
        """
        limits = [side.manifest.members[r].num_pages for side, r in self._ends(src_rank, dst_rank)]
        return self._runs(self._pages, src_rank, dst_rank, *_checked("page", src_pages, dst_pages, *limits))

    def slots(self, src_rank: int, dst_rank: int, src_slot: int, dst_slot: int) -> Runs:
        """Copies of a sequence's state, slot to slot, in all caches, between two ranks. ValueError as for pages."""
        limits = [side.manifest.members[r].num_slots for side, r in self._ends(src_rank, dst_rank)]
        return self._runs(self._slots, src_rank, dst_rank, *_checked("slot", [src_slot], [dst_slot], *limits))

    def _ends(self, src_rank: int, dst_rank: int) -> tuple[tuple[_Side, int], tuple[_Side, int]]:
        return (self._source, src_rank), (self._destination, dst_rank)

    def _runs(self, templates: dict[Pair, _Template], src_rank: int, dst_rank: int, src: Ints, dst: Ints) -> Runs:
        template = templates.get((self._source.places[src_rank], self._destination.places[dst_rank]))
        if template is None:
            return np.empty((0, 5), np.int64)
        runs = template.expand(src, dst)
        runs[:, 0] = self._source.regions[src_rank][runs[:, 0]]
        runs[:, 2] = self._destination.regions[dst_rank][runs[:, 2]]
        return runs

    def _templates(self, kind: Literal["page", "slot"]) -> dict[Pair, _Template]:
        """By places in the two groups: the same for all groups. Replicas take turns cache by cache."""
        theirs = {spec.name: (i, spec) for i, spec in enumerate(self._destination.manifest.caches)}
        src_line, dst_line = self._source.line, self._destination.line
        rows: dict[Pair, list[tuple[int, ...]]] = {}
        turns: Counter[Layout] = Counter()
        for i, spec in enumerate(self._source.manifest.caches):
            if spec.kind != kind:
                continue
            j, other = theirs[spec.name]
            width = DTYPE_BYTES[spec.dtype]
            moves = _moves(spec.layout, src_line, other.layout, dst_line, turns[spec.layout])
            for (src, dst), spans in moves.items():
                units = spec.bytes_per_unit(src_line, src), other.bytes_per_unit(dst_line, dst)
                for span in spans:
                    run = (i, span.src * width, j, span.dst * width, span.length * width)
                    rows.setdefault((src, dst), []).append((*run, *units))
            turns[spec.layout] += 1
        return {pair: _Template(np.array(found, np.int64)) for pair, found in rows.items()}


class _Side:
    """What is asked of a manifest for each request."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.line = Mesh(manifest.mesh.size_of("attn"), (Axis("attn", manifest.mesh.size_of("attn")),))
        self.places = [manifest.mesh.coordinate(rank, "attn") for rank in range(manifest.mesh.size)]
        self.regions = [np.array([r.number for r in held.regions], np.int64) for held in manifest.members]


class _Template:
    """Copies of one page (or slot) between two ranks, in all caches.

    `rows [n, 7]`: a run as in `Runs` for unit 0, with the index of a cache for its region; then the bytes of a unit in
    the source's region and in the destination's.
    """

    def __init__(self, rows: NDArray[np.int64]) -> None:
        whole = (rows[:, 4] == rows[:, 5]) & (rows[:, 4] == rows[:, 6])
        self._whole, self._parts = rows[whole], rows[~whole]

    def expand(self, src: Ints, dst: Ints) -> Runs:
        """Runs of units `src[i]` to `dst[i]`. Only whole units can be neighbours, and these join."""
        found = []
        if len(self._whole):
            first = np.ones(len(src), bool)
            first[1:] = (src[1:] != src[:-1] + 1) | (dst[1:] != dst[:-1] + 1)
            starts = np.flatnonzero(first)
            joined = np.diff(np.append(starts, len(src)))
            found.append(_placed(self._whole, src[starts], dst[starts], joined))
        if len(self._parts):
            found.append(_placed(self._parts, src, dst, 1))
        return found[0] if len(found) == 1 else np.concatenate(found)


def _placed(rows: NDArray[np.int64], src: Ints, dst: Ints, count: Ints | int) -> Runs:
    """Every row at every unit, `count` units long. Columns are rows in memory, as engines want them."""
    columns = np.empty((5, len(rows), len(src)), np.int64)
    columns[:] = rows.T[:5, :, None]
    columns[1] += rows[:, 5, None] * src
    columns[3] += rows[:, 6, None] * dst
    columns[4] *= count
    return columns.reshape(5, -1).T


def _checked(what: str, src: Sequence[int] | Ints, dst: Sequence[int] | Ints, *limits: int) -> tuple[Ints, Ints]:
    """Both lists as arrays, in the order of the destination, so that neighbours meet."""
    ends = np.asarray(src, np.int64), np.asarray(dst, np.int64)
    if ends[0].shape != ends[1].shape:
        raise ValueError(f"{len(src)} {what}s of the source for {len(dst)} of the destination")
    for side, units, limit in zip(("source", "destination"), ends, limits, strict=True):
        if len(units) and (units.min() < 1 or units.max() >= limit):  # 0 is scratch
            raise ValueError(f"{side}: {what}s {units.min()} to {units.max()} asked, it has 1 to {limit - 1}")
    order = np.argsort(ends[1])
    if (np.diff(ends[1][order]) == 0).any():
        raise ValueError(f"destination: a {what} is named twice in {ends[1].tolist()}")
    return ends[0][order], ends[1][order]


@lru_cache(1024)
def _moves(src: Layout, src_line: Mesh, dst: Layout, dst_line: Mesh, turn: int) -> dict[Pair, tuple[Span, ...]]:
    """What goes of one unit of a cache from one place to another, as few runs as possible. The layers of a model share
    a handful of layouts."""
    spans: dict[Pair, list[Span]] = {}
    for copy in reshard(src, src_line, dst, dst_line, turn):
        shapes = src.local_shape(src_line, copy.src), dst.local_shape(dst_line, copy.dst)
        spans.setdefault((copy.src, copy.dst), []).extend(flat(copy.box, *shapes))
    return {pair: tuple(merged(found)) for pair, found in spans.items()}
