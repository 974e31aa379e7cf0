"""Bytes of a rank, from the tensor tables alone: weights, one page of all layers, one slot of all layers."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.mesh import Mesh
from tessera.core.quantization import Quantization
from tessera.core.spec import ModelSpec
from tessera.core.tensors import CacheDtypes, cache_table
from tessera.core.weights import weight_bytes, weight_table


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on the rank that holds most. `page` and `slot` are those of all layers together."""

    weights: int
    page: int
    slot: int

    @property
    def least(self) -> int:
        """Of weights and pools of some use: two pages and a state, besides those of scratch."""
        return self.weights + 3 * self.page + 2 * self.slot


def sizes_of(
    spec: ModelSpec,
    mesh: Mesh,
    page_size: int,
    dtype: str,
    caches: CacheDtypes,
    quantization: Quantization | None = None,
) -> Sizes:
    """Sizes of a model run in `dtype`. Raises `LayoutError` when it cannot be laid out on `mesh`."""
    weights = weight_table(spec, mesh, quantization=quantization)
    table = cache_table(spec, page_size, caches)

    def unit(kind: str, rank: int) -> int:
        return sum(c.bytes_per_unit(mesh, rank) for c in table if c.kind == kind)

    ranks = range(mesh.size)
    return Sizes(
        max(weight_bytes(weights, mesh, rank, dtype) for rank in ranks),
        max(unit("page", rank) for rank in ranks),
        max(unit("slot", rank) for rank in ranks),
    )
