"""The mesh: the ranks of one instance, with named axes.

Several axes cut the same ranks in different ways (attention TP x DP, EP x MoE TP, dense TP), so an axis is a size and a
stride, and the coordinate of a rank on it is `rank // stride % size`. This file and `layout.py` are the only ones that
divide by a parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.errors import LayoutError

OF_EXPERTS = ("moe", "shared")  # axes along which experts are cut


@dataclass(frozen=True, slots=True)
class Axis:
    """`size` coordinates; neighbours on the axis are `stride` ranks apart."""

    name: str
    size: int
    stride: int = 1


@dataclass(frozen=True)
class Mesh:
    """`size` ranks and the axes that cut them. Every axis covers all ranks: `size % (axis.size * axis.stride) == 0`."""

    size: int
    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        for axis in self.axes:
            if self.size % (axis.size * axis.stride):
                raise LayoutError(
                    f"axis '{axis.name}' (size {axis.size}, stride {axis.stride}) does not cut {self.size} ranks evenly"
                )

    def axis(self, name: str) -> Axis:
        """The axis of that name; a mesh without it has it with size 1."""
        return next((a for a in self.axes if a.name == name), Axis(name, 1))

    def size_of(self, name: str | None) -> int:
        """Number of coordinates on an axis; 1 for None."""
        return 1 if name is None else self.axis(name).size

    def coordinate(self, rank: int, name: str | None) -> int:
        """Coordinate of `rank` on an axis; 0 for None."""
        if name is None:
            return 0
        axis = self.axis(name)
        return rank // axis.stride % axis.size

    def adds_up(self, name: str | None) -> bool:
        """Whether what ranks make over an axis is a part of a sum, in this layout or, of experts, in every one: what
        they make of a token is added up on one rank too."""
        return name in OF_EXPERTS or self.size_of(name) > 1

    def group(self, rank: int, name: str) -> tuple[int, ...]:
        """Ranks that differ from `rank` only in their coordinate on an axis, in order of it."""
        axis = self.axis(name)
        first = rank - self.coordinate(rank, name) * axis.stride
        return tuple(first + i * axis.stride for i in range(axis.size))

    def groups(self, rank: int) -> list[tuple[int, ...]]:
        """The groups of several ranks that `rank` is in on any axis, each once, in one order on all ranks."""
        return sorted({group for axis in self.axes if len(group := self.group(rank, axis.name)) > 1})


def instance_mesh(
    tp: int = 1,
    dp: int = 1,
    ep: int = 1,
    dense_tp: int | None = None,
    dp_lm_head: bool = False,
    all_to_all: bool = False,
) -> Mesh:
    """Mesh of one serving instance of `tp` ranks in SGLang's meaning.

    attn: attention TP = tp / dp, neighbours; dp: groups of them; moe: TP inside an expert = tp / ep; expert: EP over
    those; shared: TP of shared experts, all ranks, or one where tokens travel to their experts (`all_to_all`); dense:
    TP of dense MLPs; vocab: TP of embedding and head, the attention's (`dp_lm_head`) or all ranks; tp: all ranks. A
    group of ranks as the attention sees it: `G/dp` are the attention groups that it joins, `G/attn` its ranks inside
    one of them.
    """
    dense = tp if dense_tp is None else dense_tp
    for name, size in (("dp", dp), ("ep", ep), ("dense_tp", dense)):
        if size < 1 or tp % size:
            raise LayoutError(f"{name} {size} does not divide tp {tp}; choose a divisor of {tp}")
    attn = tp // dp
    axes = [Axis("attn", attn), Axis("dp", dp, attn), Axis("moe", tp // ep), Axis("expert", ep, tp // ep)]
    axes.append(Axis("shared", 1 if all_to_all else tp))
    for name, size in (("tp", tp), ("dense", dense), ("vocab", attn if dp_lm_head else tp)):
        if size % attn and attn % size:
            raise LayoutError(f"{name} {size} cuts attention groups of {attn} ranks; one must divide the other")
        axes += [
            Axis(name, size),
            Axis(f"{name}/dp", max(size // attn, 1), attn),
            Axis(f"{name}/attn", min(size, attn)),
        ]
    return Mesh(tp, tuple(axes))


def divisors(ranks: int) -> list[int]:
    """Sizes into which `ranks` can be cut evenly, smallest first."""
    return [n for n in range(1, ranks + 1) if ranks % n == 0]


def even_lengths(total: int, ranks: int) -> tuple[int, ...]:
    """Lengths of `ranks` neighbouring parts of `total`, as even as can be, the longer ones first."""
    return tuple((total + ranks - 1 - r) // ranks for r in range(ranks))


def share(total: int, ranks: int) -> int:
    """What each of `ranks` gets of something that they have in common, rounded down."""
    return total // ranks


def ranks_of(ranks: int, hosts: int, host: int) -> range:
    """The neighbouring ranks that one of several hosts has; every host has as many."""
    each = share(ranks, hosts)
    return range(each * host, each * (host + 1))


def dealt(number: int, ranks: int) -> int:
    """Which of `ranks` has `number`, when numbers are dealt out in turn."""
    return number % ranks


SINGLE = instance_mesh()
