"""What layers share: weights by name with their layouts, and a step's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tessera.comm.base import Comm
from tessera.core.layout import Dim
from tessera.core.mesh import Mesh
from tessera.core.parts import NOTHING, Wide
from tessera.core.spec import RopeSpec
from tessera.core.tensors import TensorSpec
from tessera.models.forms import Forms
from tessera.ops.aside import Aside
from tessera.ops.backend import Backend
from tessera.ops.fp8 import Fp8Weight
from tessera.ops.linear import PackedLinear, linear, unrounded
from tessera.ops.rope import RopeTables
from tessera.ops.segments import Segments

Tile = Tensor | PackedLinear | Fp8Weight  # as `models/load.py` loads them


@dataclass(frozen=True)
class Weights:
    """The tiles of one rank by run-time name, and what their layouts say. "linear" tensors may be packed."""

    table: Mapping[str, TensorSpec]
    tensors: Mapping[str, Tile]
    mesh: Mesh
    rank: int
    prefix: str = ""

    def at(self, name: str) -> Weights:
        """The weights under `name`."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def tensor(self, name: str) -> Tensor:
        """A tile that is a plain tensor."""
        tile = self.tensors[self.prefix + name]
        assert isinstance(tile, Tensor), f"{self.prefix}{name} is packed"
        return tile

    def linear(self, name: str) -> PackedLinear:
        """A tile that was prepared for `ops.linear`."""
        tile = self.tensors[self.prefix + name]
        assert isinstance(tile, PackedLinear), f"{self.prefix}{name} is not packed"
        return tile

    def experts(self, name: str) -> Tensor | Fp8Weight:
        """A weight of all experts that the rank holds."""
        tile = self.tensors[self.prefix + name]
        assert not isinstance(tile, PackedLinear), f"{self.prefix}{name} is packed"
        return tile

    def slices(self, name: str) -> dict[str, slice]:
        """Where each section of its rows (the first dim) lies in the tile."""
        rows, place = self._rows(name)
        return rows.local(*place)

    def units(self, name: str) -> dict[str, int]:
        """Units of each section of its rows in the tile."""
        rows, place = self._rows(name)
        return rows.local_units(*place)

    def held(self, name: str) -> list[int]:
        """The units that the tile holds of rows of one section, in order."""
        rows, place = self._rows(name)
        (section,) = rows.sections
        return list(section.held(*place))

    def holders(self, name: str) -> list[list[int]]:
        """What `held` is on every rank of the mesh."""
        return [replace(self, rank=rank).held(name) for rank in range(self.mesh.size)]

    def _rows(self, name: str) -> tuple[Dim, tuple[int, int]]:
        """The first dim, and over how many ranks it is cut and which of them this is."""
        rows = self.table[self.prefix + name].layout.dims[0]
        return rows, (self.mesh.size_of(rows.axis), self.mesh.coordinate(self.rank, rows.axis))


@dataclass(frozen=True)
class Tools:
    """What layers compute and talk with. `eps`, `zero_centred`: of norms. `padded_up_to`: see `comm/dispatch.py`.

    `wide`: what is rounded only when all of a sum is there.
    """

    comm: Comm
    backend: Backend
    ropes: Mapping[RopeSpec, RopeTables]
    eps: float
    zero_centred: bool
    aside: Aside
    padded_up_to: int = 0
    wide: Wide = NOTHING

    def widens(self, group: str) -> bool:
        """Whether parts of a sum over `group` are kept in fp32; a sum of one part is rounded by who makes it."""
        return self.wide.sums and self.comm.mesh.adds_up(group)

    def part(self, x: Tensor, packed: PackedLinear, group: str) -> Tensor:
        """`linear`, as this rank's part of a sum over `group`."""
        return (unrounded if self.widens(group) else linear)(x, packed)

    def added_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + added), x + added), all [T, hidden]."""
        if added is None:
            return self.backend.rmsnorm(x, weight, self.eps, self.zero_centred), x
        return self.backend.add_rmsnorm(added, x, weight, self.eps, self.zero_centred)


@dataclass(frozen=True)
class Batch:
    """A step as layers see it: its ranges, the caches by `CacheSpec.name`, and the form of each op.

    `counts`: tokens of every DP rank of the instance; those of this one are the ranges'. `largest`: those of all DP
    ranks together, of the largest of the halves that run side by side.
    """

    segments: Segments
    caches: Mapping[str, Tensor]
    forms: Forms
    counts: tuple[int, ...]
    largest: int
