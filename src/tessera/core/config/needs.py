"""What the memory of a rank goes to besides weights and pools: a table of named rows.

Each row is a function of a `Sketch` and stands beside the thing that it measures (`run/needs.py` lists them), so this
layer only adds them up. All are upper bounds of what is held at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tessera.core.config.types import KernelConfig, MeshConfig
from tessera.core.mesh import Mesh
from tessera.core.spec import ModelSpec
from tessera.core.tensors import DTYPE_BYTES
from tessera.core.weights import weight_table


@dataclass(frozen=True, slots=True)
class Sketch:
    """An instance before its pools are sized. `tokens`: of the largest step of a DP rank; `rows`: of the row table.

    `kernels`: with the graphs that so many rows may have. `split_from`: tokens from which on a step runs as two halves
    (0: none does).
    """

    spec: ModelSpec
    ranks: MeshConfig
    dtype: str
    kernels: KernelConfig
    tokens: int
    rows: int
    context: int
    page_size: int
    split_from: int = 0

    @property
    def mesh(self) -> Mesh:
        """The ranks with their named axes."""
        return self.ranks.mesh

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def graphed(self) -> bool:
        """Some steps run as CUDA graphs."""
        return any(self.kernels.graphs)

    def shapes(self, rank: int = 0) -> dict[str, tuple[int, ...]]:
        """The shape of every weight of a rank, by name."""
        return {t.name: t.layout.local_shape(self.mesh, rank) for t in weight_table(self.spec, self.mesh)}


Count = Callable[[Sketch], int]
Rows = tuple[tuple[str, int], ...]


def counted(needs: tuple[tuple[str, Count], ...], sketch: Sketch) -> Rows:
    """The rows that are not empty, in order, in bytes."""
    rows = ((name, count(sketch)) for name, count in needs)
    return tuple((name, size) for name, size in rows if size)


def total(rows: Rows) -> int:
    """Bytes of all rows."""
    return sum(size for _, size in rows)
