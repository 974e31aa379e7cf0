"""Scales of fp8 tiles, derived from the layout: where in a tile the stored blocks begin that it touches.

Otherwise fp8 answers would depend on the layout. Block formats: DeepSeek-V3 technical report (arXiv 2412.19437), 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import gcd, prod

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim
from tessera.core.mesh import Mesh
from tessera.core.quantization import Quantization
from tessera.core.tensors import DTYPE_BYTES, TensorSpec

LEAST = 16  # elements that a scale repeats over, the finest step a kernel takes
SCALE_BYTES = 4


def scale_step(dim: Dim, size: int, ranks: Iterable[int], block: int) -> int:
    """Over how many elements of a part a scale repeats: the common divisor of all borders that `ranks` see, where the
    checkpoint is quantised in blocks of `block` stored elements.

    A cut inside a block (704 columns are 5.5 blocks of 128) repeats scales, so that every shard dequantises to the bit
    as the whole does; nothing is requantised. Raises `LayoutError` when the divisor is below `LEAST`.
    """
    step = gcd(block, *(at for rank in ranks for at in _borders(dim, size, rank, block)))
    if step < min(LEAST, block):
        raise LayoutError(
            f"dim '{dim.name}': cut for {size} ranks its blocks of {block} meet only every {step} elements; "
            f"scales can repeat at {LEAST} or more, so use fewer ranks, or --fp8-gemm-backend dequantize"
        )
    return step


def _borders(dim: Dim, size: int, rank: int, block: int) -> Iterator[int]:
    """Places in the tile at which a stored block begins."""
    for run in dim.stored(size, rank):
        blocks = range(run.start // block, -(-(run.start + run.length) // block))
        yield from (run.local + max(n * block - run.start, 0) for n in blocks)


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
                    f"{run.start + run.length - 1}, which cuts a group of {group} that fp8 activations share a scale "
                    "in; use fewer ranks, or --fp8-gemm-backend dequantize"
                )


def in_blocks(tensor: TensorSpec, quantization: Quantization) -> TensorSpec:
    """The tensor as it is kept: in blocks if the checkpoint's tensors are that it comes from, or some of its rows."""
    if tensor.role not in ("linear", "experts"):
        return tensor
    rows, columns = tensor.layout.dims[-2:]
    whose = rows if any(section.stored for section in rows.sections) else columns
    plain = tuple(s.name for s in whose.sections if s.stored is None or not quantization.covers(s.stored.tensor))
    if len(plain) == len(whose.sections):
        return tensor
    return replace(tensor, block=quantization.block, plain=plain)


def check_blocks(tensor: TensorSpec, mesh: Mesh) -> None:
    """Raises `LayoutError` when the tensor's blocks, or the groups of its inputs, cannot be cut as `mesh` asks."""
    for part in tensor.parts():
        if part.block is not None:
            rows, columns = part.layout.dims[-2:]
            size = mesh.size_of(rows.axis)
            if any(section.stored for section in rows.sections):
                scale_step(rows, size, range(size), part.block[0])
            check_groups(columns, mesh.size_of(columns.axis), part.block[1])


def tile_blocks(tensor: TensorSpec, mesh: Mesh, rank: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Of a tensor in blocks, in the tile of `rank`: (rows, columns) that share a scale, and the shape of the scales."""
    assert tensor.block is not None, tensor.name
    rows, (step, width) = tensor.layout.dims[-2], tensor.block
    if any(section.stored for section in rows.sections):
        step = scale_step(rows, mesh.size_of(rows.axis), [mesh.coordinate(rank, rows.axis)], step)
    *outer, height, length = tensor.layout.local_shape(mesh, rank)
    return (step, width), (*outer, -(-height // step), -(-length // width))


def tile_bytes(tensor: TensorSpec, mesh: Mesh, rank: int, dtype: str) -> int:
    """Bytes of the tile of `rank`, scales included, where it is in `dtype` if not in blocks."""
    total = 0
    for part in tensor.parts():
        count = prod(part.layout.local_shape(mesh, rank))
        if part.block is None:
            total += count * DTYPE_BYTES[dtype]
        else:
            total += count + SCALE_BYTES * prod(tile_blocks(part, mesh, rank)[1])
    return total
