"""The layout algebra: how a tensor is cut into tiles that cover it with no gap and no overlap.

A dim is a row of named **sections** (`q | k | v`, `gate | up`, experts, vocabulary). A section is `units` equal units
(heads, experts, rows) of `width` elements. Along one mesh axis a rank holds some units of *every* section, packed in
section order. From that alone follow the slice of a weight that a rank loads (`Dim.held`), the size of its pools
(`Layout.local_shape`) and the copies that turn one layout into another (`reshard`).

Valid sizes: one of units and ranks divides the other. With more ranks than units, neighbours hold the same unit:
`rank // (size // units)`, never `rank % units`. A *derived* section (`leaders`: keys beside their values, KV heads beside
their queries) holds the units that its leaders' units need: `leader // group`. Exceptions: `table` (experts, placed
explicitly) and `padding` (vocabulary, trailing units that no checkpoint stores).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from math import gcd, prod

from tessera.core.errors import LayoutError
from tessera.core.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a checkpoint keeps a section: unit u lies at `start + u // per * stride + u % per * width`.

    `tensor` is the name in the checkpoint; `{name}` in it stands for the unit of an indexed dim of that name (experts
    saved one by one). Stored order is not run-time order: Qwen3-Next's qkvz interleaves per key head.
    """

    tensor: str
    start: int = 0
    stride: int | None = None
    per: int = 1

    def offset(self, unit: int, width: int) -> int:
        """First stored element of `unit`."""
        stride = width * self.per if self.stride is None else self.stride
        return self.start + unit // self.per * stride + unit % self.per * width


@dataclass(frozen=True, slots=True)
class Section:
    """`units` units of `width` elements. `leaders`: number of leader units it is derived from (None: it leads)."""

    name: str
    units: int
    width: int = 1
    leaders: int | None = None
    table: tuple[tuple[int, ...], ...] | None = None
    padding: int = 0
    stored: Stored | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.units < 1 or self.width < 1 or not 0 <= self.padding < self.units:
            raise LayoutError(f"section '{self.name}': {self.units} units of {self.width} with padding {self.padding}")
        if self.leaders is not None and self.leaders % self.units:
            raise LayoutError(f"section '{self.name}': {self.leaders} leaders are not a multiple of {self.units} units")

    @property
    def length(self) -> int:
        """Elements of the whole section."""
        return self.units * self.width

    def check(self, size: int) -> None:
        """Raises `LayoutError`, by name, when the section cannot be cut for `size` ranks."""
        if self.table is not None:
            if len(self.table) != size:
                raise LayoutError(f"section '{self.name}': its table places units on {len(self.table)} ranks, not {size}")
            if set().union(*self.table) != set(range(self.units)):
                raise LayoutError(f"section '{self.name}': its table does not place every one of {self.units} units")
            return
        for what, units in (("units", self.units), ("leading units", self.leaders or self.units)):
            if units % size and size % units:
                raise LayoutError(
                    f"section '{self.name}': {units} {what} cannot be cut for {size} ranks; "
                    f"one must divide the other (allowed: {_allowed(units)})"
                )

    def held(self, size: int, rank: int) -> tuple[int, ...]:
        """Units that coordinate `rank` of `size` holds, in the order in which they are packed."""
        self.check(size)
        if self.table is not None:
            return self.table[rank]
        lead = self.leaders or self.units
        if lead % size == 0:
            share = lead // size
            units = range(rank * share, (rank + 1) * share)
        else:
            units = range(rank // (size // lead), rank // (size // lead) + 1)
        group = lead // self.units
        return tuple(dict.fromkeys(u // group for u in units))

    def replicated(self, size: int) -> bool:
        """True when some unit has more than one holder."""
        return sum(len(self.held(size, rank)) for rank in range(size)) > self.units


def _allowed(units: int) -> str:
    return ", ".join(str(n) for n in range(1, units + 1) if units % n == 0) + f", or a multiple of {units}"


@dataclass(frozen=True, slots=True)
class Run:
    """`length` neighbouring elements: `start` in the whole dim, `local` in the holder's part."""

    start: int
    local: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredRun:
    """`length` neighbouring elements: `start` in tensor `tensor` of a checkpoint, `local` in the holder's part."""

    tensor: str
    start: int
    local: int
    length: int


@dataclass(frozen=True, slots=True)
class Dim:
    """A dim of a tensor: sections in order, cut along mesh axis `axis` (None: whole on every rank).

    `summed`: the dim feeds a sum across ranks (the input dim of a row-parallel weight) and may not be replicated.
    `indexed`: the checkpoint keeps each unit as a tensor of its own (see `Stored`).
    """

    name: str
    sections: tuple[Section, ...]
    axis: str | None = None
    summed: bool = False
    indexed: bool = False

    @property
    def length(self) -> int:
        """Elements of the whole dim."""
        return sum(s.length for s in self.sections)

    def starts(self) -> dict[str, int]:
        """First element of each section in the whole dim."""
        starts, at = {}, 0
        for section in self.sections:
            starts[section.name] = at
            at += section.length
        return starts

    def check(self, size: int) -> None:
        """Raises `LayoutError` when the dim cannot be cut for `size` ranks."""
        for section in self.sections:
            section.check(size)
            if self.summed and section.replicated(size):
                raise LayoutError(
                    f"dim '{self.name}': section '{section.name}' of {section.units} units would be replicated on {size} "
                    f"ranks and its part of the sum counted twice; use at most {section.units} ranks"
                )

    def _units(self, size: int, rank: int) -> Iterator[tuple[Section, int, int, int]]:
        """(section, unit, start in the whole, start in the part) of each unit held, in packed order."""
        self.check(size)
        base = local = 0
        for section in self.sections:
            for unit in section.held(size, rank):
                yield section, unit, base + unit * section.width, local
                local += section.width
            base += section.length

    def held(self, size: int, rank: int) -> tuple[Run, ...]:
        """What coordinate `rank` of `size` holds, as few runs as possible."""
        runs = [Run(start, local, section.width) for section, _, start, local in self._units(size, rank)]
        return tuple(_joined(runs, lambda a, b: a.start + a.length == b.start))

    def stored(self, size: int, rank: int) -> tuple[StoredRun, ...]:
        """The runs of checkpoint tensors that fill the part of coordinate `rank`; padding has none."""
        runs = []
        for section, unit, _, local in self._units(size, rank):
            if section.stored is None:
                raise LayoutError(f"dim '{self.name}': section '{section.name}' is in no checkpoint")
            if unit < section.units - section.padding:
                start = section.stored.offset(unit, section.width)
                runs.append(StoredRun(section.stored.tensor, start, local, section.width))
        return tuple(_joined(runs, lambda a, b: a.tensor == b.tensor and a.start + a.length == b.start))

    def local_length(self, size: int, rank: int) -> int:
        """Elements that coordinate `rank` of `size` holds."""
        return sum(run.length for run in self.held(size, rank))

    def local(self, size: int, rank: int) -> dict[str, slice]:
        """Where each section lies in the part of coordinate `rank`."""
        slices, at = {}, 0
        for section in self.sections:
            length = len(section.held(size, rank)) * section.width
            slices[section.name] = slice(at, at + length)
            at += length
        return slices

    def local_units(self, size: int, rank: int) -> dict[str, int]:
        """Units of each section in the part of coordinate `rank`."""
        return {s.name: len(s.held(size, rank)) for s in self.sections}


def _joined(runs: list, fits) -> Iterator:  # type: ignore[no-untyped-def,type-arg]
    """Joins neighbours whose local ends meet and for which `fits(a, b)`; keeps the order."""
    from_runs = iter(runs)
    last = next(from_runs, None)
    for run in from_runs:
        if last.local + last.length == run.local and fits(last, run):
            last = type(last)(**{**_fields(last), "length": last.length + run.length})
        else:
            yield last
            last = run
    if last is not None:
        yield last


def _fields(run: object) -> dict[str, object]:
    return {name: getattr(run, name) for name in run.__slots__}  # type: ignore[attr-defined]


def whole(name: str, length: int) -> Dim:
    """A dim that every rank holds whole."""
    return Dim(name, (Section(name, 1, length),))


def padded(units: int, size: int) -> tuple[int, int]:
    """(units, padding) of the smallest multiple of `size` that is at least `units` (vocabulary)."""
    padding = -units % size
    return units + padding, padding


@dataclass(frozen=True, slots=True)
class Layout:
    """The dims of one tensor. Two dims may not be cut along the same axis."""

    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        axes = [d.axis for d in self.dims if d.axis is not None]
        if len(set(axes)) != len(axes):
            raise LayoutError(f"two dims of {[d.name for d in self.dims]} are cut along one axis: {axes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(d.length for d in self.dims)

    def check(self, mesh: Mesh) -> None:
        """Raises `LayoutError` when the tensor cannot be laid out on `mesh`."""
        for dim in self.dims:
            dim.check(mesh.size_of(dim.axis))

    def runs(self, mesh: Mesh, rank: int) -> tuple[tuple[Run, ...], ...]:
        """Per dim, what `rank` holds; its tile is their product."""
        return tuple(d.held(mesh.size_of(d.axis), mesh.coordinate(rank, d.axis)) for d in self.dims)

    def local_shape(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """Shape of the tile of `rank`."""
        return tuple(sum(run.length for run in runs) for runs in self.runs(mesh, rank))


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


def reshard(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh) -> list[Copy]:
    """Copies that fill every tile of `dst` from the tiles of `src`: each destination element once.

    Both describe the same whole tensor, perhaps on meshes of different sizes. Where several source ranks hold an
    element, destinations take turns among them. Raises `LayoutError` when the two are not the same tensor.
    """
    _same_tensor(src, dst)
    src.check(src_mesh)
    dst.check(dst_mesh)
    copies = []
    for rank in range(dst_mesh.size):
        tile = dst.runs(dst_mesh, rank)
        choices = [_sources(s, src_mesh, runs, rank) for s, runs in zip(src.dims, tile, strict=True)]
        for picks in product(*choices):
            holder = _holder(src, src_mesh, [coordinate for coordinate, _ in picks], rank)
            copies.append(Copy(holder, rank, tuple(span for _, span in picks)))
    return copies


def _same_tensor(src: Layout, dst: Layout) -> None:
    def real(layout: Layout) -> list[list[tuple[str, int, int]]]:
        return [[(s.name, s.units - s.padding, s.width) for s in d.sections] for d in layout.dims]

    if real(src) != real(dst):
        raise LayoutError(f"not the same tensor: source {real(src)}, destination {real(dst)}")
    for a, b in zip(src.dims, dst.dims, strict=True):
        if len(a.sections) > 1 and [s.padding for s in a.sections] != [s.padding for s in b.sections]:
            raise LayoutError(f"dim '{a.name}': sections padded differently cannot be compared")


def _sources(dim: Dim, mesh: Mesh, runs: tuple[Run, ...], taker: int) -> list[tuple[int, Span]]:
    """(coordinate of the source, span) pairs that cover `runs` once. Only elements that the source has are covered."""
    size = mesh.size_of(dim.axis)
    holders: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for coordinate in range(size):
        for section, _, start, local in dim._units(size, coordinate):
            holders.setdefault((start, section.width), []).append((coordinate, local))
    spans: list[tuple[int, Span]] = []
    for start, width in sorted(holders):
        among = holders[start, width]
        coordinate, local = among[taker % len(among)]
        for run in runs:
            low, high = max(start, run.start), min(start + width, run.start + run.length)
            if low < high:
                spans.append((coordinate, Span(local + low - start, run.local + low - run.start, high - low)))
    return _joined_spans(spans)


def _joined_spans(spans: list[tuple[int, Span]]) -> list[tuple[int, Span]]:
    joined: list[tuple[int, Span]] = []
    for coordinate in sorted({c for c, _ in spans}):
        joined += [(coordinate, s) for s in merged(s for c, s in spans if c == coordinate)]
    return joined


def _holder(layout: Layout, mesh: Mesh, coordinates: list[int], taker: int) -> int:
    """A rank with these coordinates; takers of the same tile take turns among the replicas."""
    wanted = [(d.axis, c) for d, c in zip(layout.dims, coordinates, strict=True) if d.axis is not None]
    ranks = [r for r in range(mesh.size) if all(mesh.coordinate(r, axis) == c for axis, c in wanted)]
    return ranks[taker % len(ranks)]


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
    src_strides = [prod(src_shape[i + 1 :]) for i in range(len(box))]
    dst_strides = [prod(dst_shape[i + 1 :]) for i in range(len(box))]
    spans = []
    for index in product(*(range(s.length) for s in box[:-1])):
        src = sum((s.src + i) * stride for s, i, stride in zip(box, index, src_strides, strict=False))
        dst = sum((s.dst + i) * stride for s, i, stride in zip(box, index, dst_strides, strict=False))
        spans.append(Span(src + box[-1].src, dst + box[-1].dst, box[-1].length))
    return merged(spans)


@dataclass(frozen=True, slots=True)
class ScaleTile:
    """Scales of one tile along a dim: one per `block` elements of the tile, and the global block each stands for."""

    block: int
    blocks: tuple[int, ...]


def scale_tile(dim: Dim, size: int, rank: int, block: int = 128) -> ScaleTile:
    """Scales of the part of coordinate `rank` when the whole dim is quantised in global blocks of `block`.

    A cut inside a block (704 columns are 5.5 blocks of 128) repeats scales at the common divisor of the block and the
    borders of the part, so that the shard dequantises to the bit as the whole does; nothing is requantised. The phase of
    the first row follows: block i of the tile is global block `blocks[i]`. Blocks are counted from each section's start.
    """
    starts, step = dim.starts(), block
    pieces: list[tuple[int, int]] = []
    for section, unit, start, _ in dim._units(size, rank):
        inside = start - starts[section.name]
        pieces.append((starts[section.name], inside))
        # One unit's borders are its start and its end; whole sections cut nowhere need no finer step.
        if inside % block or (section.width % block and unit + 1 < section.units):
            step = gcd(step, gcd(inside, section.width))
    return ScaleTile(step, _blocks_of(dim, size, rank, step, block))


def _blocks_of(dim: Dim, size: int, rank: int, step: int, block: int) -> tuple[int, ...]:
    first, count = {}, 0
    for section in dim.sections:
        first[section.name] = count
        count += -(-section.length // block)
    starts, blocks, carried = dim.starts(), [], 0
    for section, _, start, local in dim._units(size, rank):
        inside = start - starts[section.name]
        for at in range(-local % step if carried else 0, section.width, step):
            blocks.append(first[section.name] + (inside + at) // block)
        carried = local + section.width
    return tuple(blocks)
