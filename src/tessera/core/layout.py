"""The layout algebra: how a tensor is cut into tiles that cover it with no gap and no overlap.

A dim is a row of named **sections** (`q | k | v`, `gate | up`, experts, vocabulary). A section is `units` equal units
(heads, experts, rows) of `width` elements. Along one mesh axis a rank holds some units of *every* section, packed in
section order. From that alone follow the slice of a weight that a rank loads (`Dim.held`), the size of its pools
(`Layout.local_shape`) and the copies that turn one layout into another (`reshard.py`).

Valid sizes: one of units and ranks divides the other. With more ranks than units, neighbours hold the same unit:
`rank // (size // units)`, never `rank % units`. A *derived* section (`leaders`: keys beside their values, KV heads
beside their queries) holds the units that its leaders' units need: `leader // group`. Exceptions: `table` (experts,
placed explicitly) and `padding` (vocabulary, trailing units that no checkpoint stores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

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

    def dense(self, width: int) -> bool:
        """True when all units follow each other without a gap."""
        return self.stride is None or self.stride == width * self.per

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
                raise LayoutError(f"section '{self.name}': its table is for {len(self.table)} ranks, not {size}")
            if set().union(*self.table) != set(range(self.units)):
                raise LayoutError(f"section '{self.name}': its table does not place every one of {self.units} units")
            return
        for what, units in (("units", self.units), ("leading units", self.leaders or self.units)):
            if units % size and size % units:
                raise LayoutError(
                    f"section '{self.name}': {units} {what} cannot be cut for {size} ranks; "
                    f"one must divide the other (allowed: {_allowed(units)})"
                )

    def held(self, size: int, rank: int) -> Sequence[int]:
        """Units that coordinate `rank` of `size` holds, in the order in which they are packed."""
        self.check(size)
        if self.table is not None:
            return self.table[rank]
        lead = self.leaders or self.units
        share = max(lead // size, 1)
        first = rank * share if lead % size == 0 else rank // (size // lead)
        group = lead // self.units
        return range(first // group, (first + share - 1) // group + 1)

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
class _Block:
    """Neighbouring units of one section that lie together in a part."""

    section: Section
    units: range
    run: Run


def _neighbours(units: Sequence[int]) -> Iterator[range]:
    if isinstance(units, range):
        yield units
        return
    first = 0
    for i in range(1, len(units) + 1):
        if i == len(units) or units[i] != units[i - 1] + 1:
            yield range(units[first], units[i - 1] + 1)
            first = i


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
                    f"dim '{self.name}': section '{section.name}' of {section.units} units would be replicated on "
                    f"{size} ranks and its part of the sum counted twice; use at most {section.units} ranks"
                )

    def _blocks(self, size: int, rank: int) -> Iterator[_Block]:
        """What coordinate `rank` of `size` holds, as neighbouring units of one section, in packed order."""
        self.check(size)
        base = local = 0
        for section in self.sections:
            for units in _neighbours(section.held(size, rank)):
                yield _Block(section, units, Run(base + units.start * section.width, local, len(units) * section.width))
                local += len(units) * section.width
            base += section.length

    def held(self, size: int, rank: int) -> tuple[Run, ...]:
        """What coordinate `rank` of `size` holds, as few runs as possible."""
        runs = [block.run for block in self._blocks(size, rank)]
        return tuple(_joined(runs, lambda a, b: a.start + a.length == b.start))

    def stored(self, size: int, rank: int) -> tuple[StoredRun, ...]:
        """The runs of checkpoint tensors that fill the part of coordinate `rank`; padding has none."""
        runs = [run for block in self._blocks(size, rank) for run in self._stored(block)]
        return tuple(_joined(runs, lambda a, b: a.tensor == b.tensor and a.start + a.length == b.start))

    def _stored(self, block: _Block) -> Iterator[StoredRun]:
        section, stored = block.section, block.section.stored
        if stored is None:
            raise LayoutError(f"dim '{self.name}': section '{section.name}' is in no checkpoint")
        real = range(block.units.start, min(block.units.stop, section.units - section.padding))
        at = real.start
        while at < real.stop:
            # Neighbouring units are neighbours in the checkpoint too up to the end of a stored group of `per`.
            end = real.stop if stored.dense(section.width) else min(real.stop, (at // stored.per + 1) * stored.per)
            local = block.run.local + (at - block.units.start) * section.width
            yield StoredRun(stored.tensor, stored.offset(at, section.width), local, (end - at) * section.width)
            at = end

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


_AnyRun = TypeVar("_AnyRun", Run, StoredRun)


def _joined(runs: Iterable[_AnyRun], fits: Callable[[_AnyRun, _AnyRun], bool]) -> list[_AnyRun]:
    """Joins neighbours that meet in the part and for which `fits(a, b)`; keeps the order."""
    out: list[_AnyRun] = []
    for run in runs:
        if out and out[-1].local + out[-1].length == run.local and fits(out[-1], run):
            out[-1] = replace(out[-1], length=out[-1].length + run.length)
        else:
            out.append(run)
    return out


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
