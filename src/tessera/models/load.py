"""Loads the weights of one rank, tensor by tensor, straight into their final storage.

For every tensor of the table the pieces that its layout names are copied into the rank's tile; a "linear" one is then
packed, which replaces the tile. At no time are there two copies of more than one tensor. A device's tiles are read by
several threads at once, block by block through pinned memory: one reads slower than storage does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from tessera.core.errors import ModelError
from tessera.core.mesh import SINGLE, Mesh
from tessera.core.scales import tile_blocks
from tessera.core.tensors import Piece, TensorSpec
from tessera.models.cache_scales import OF_CACHE
from tessera.models.parts import Tile
from tessera.models.source import Source
from tessera.ops import fp8
from tessera.ops.fp8 import Fp8Weight
from tessera.ops.linear import PackedLinear, pack, stacked
from tessera.ops.precision import wide

LoadedT = TypeVar("LoadedT")
READERS = 8  # threads; each copies once in memory and once to the device
Progress = Callable[[int, int], None]  # elements loaded, elements in all

# Tensors of a checkpoint that need no place here: computed ones, the vision part, draft layers and their copies of
# embedding and head. Scales of a quantised KV cache have a table of their own.
KNOWN = re.compile(
    r"rotary_emb\.inv_freq$|^(model\.)?visual\.|^mtp\.|\.shared_head\.head\.weight$"
    r"|^model\.layers\.\d+\.embed_tokens\.weight$"
)
LAYER = re.compile(r"^((model|mtp)\.layers\.\d+|(model\.)?visual)\.")
SHOWN = 8  # of the tensors that an error names


def load_weights(
    source: Source | None,
    table: Sequence[TensorSpec],
    mesh: Mesh,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pack_linear: Callable[..., PackedLinear] = pack,
    progress: Progress | None = None,
    pack_fp8: Callable[[Fp8Weight], PackedLinear] = fp8.pack,
    wide_sums: bool = False,
) -> dict[str, Tile]:
    """The tiles of `rank` by run-time name. Raises `ModelError` naming tensors that are missing or misshapen.

    `source` None: nothing is read, the tiles hold anything (a device without memory). `wide_sums`: products that are
    parts of sums will be `linear.unrounded`.
    """
    if source is not None:
        check(source, table)
    tiles: dict[str, Tile] = {}
    done, total = 0, sum(prod(t.layout.local_shape(mesh, rank)) for t in table)

    def load(part: TensorSpec) -> Tensor | Fp8Weight:
        if part.block is not None:
            return load_fp8(source, part, mesh, rank, device)
        return load_tile(source, part, mesh, rank, wide(dtype) if part.wide else dtype, device)

    def packed(part: TensorSpec, loaded: Iterator[Tensor | Fp8Weight]) -> Tile:
        """A part, in its form: where that is another one, the memory of the first is free before the next is read."""
        tile = next(loaded)
        if part.role != "linear":
            return tile
        if not isinstance(tile, Tensor):
            return pack_fp8(tile)
        return pack_linear(tile, packs=not (wide_sums and part.gives_parts(mesh)))

    parts = [part for spec in table for part in spec.parts()]
    with in_order(load, parts, readers(source, device), device) as loaded:
        for spec in table:
            found = [packed(part, loaded) for part in spec.parts()]
            rows = [part for part in found if isinstance(part, PackedLinear)]
            tiles[spec.name] = stacked(rows) if rows else found[0]
            done += prod(spec.layout.local_shape(mesh, rank))
            del found, rows
            if progress is not None:
                progress(done, total)
    return tiles


def readers(source: Source | None, device: torch.device | str) -> int:
    """How many threads read at once. On a CPU what they read ahead would be memory beyond that of the model."""
    return READERS if source is not None and source.waits and torch.device(device).type == "cuda" else 1


@contextmanager
def in_order(
    load: Callable[[TensorSpec], LoadedT], parts: Sequence[TensorSpec], threads: int, device: torch.device | str
) -> Iterator[Iterator[LoadedT]]:
    """What `load` gives of each part, in their order, by so many threads that run ahead; one: when it is asked for."""
    if threads == 1:
        yield map(load, parts)
        return
    home = torch.device(device).index  # else a thread pins its memory by another device
    begin = partial(torch.cuda.set_device, home) if home is not None else None
    pool = ThreadPoolExecutor(threads, "tessera-load", begin)
    try:
        yield pool.map(load, parts)
    finally:
        pool.shutdown(cancel_futures=True)


def load_tile(
    source: Source | None,
    spec: TensorSpec,
    mesh: Mesh,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One tile, in memory that the source can write; padding is zeros."""
    shape = spec.layout.local_shape(mesh, rank)
    padded = any(section.padding for dim in spec.layout.dims for section in dim.sections)
    tile = (torch.zeros if padded else torch.empty)(shape, dtype=dtype, device=device)
    if source is not None:
        for piece in spec.pieces(mesh, rank):
            _copy(source, piece, tile)
    return tile


def load_fp8(
    source: Source | None, spec: TensorSpec, mesh: Mesh, rank: int, device: torch.device | str = "cpu"
) -> Fp8Weight:
    """One tile in blocks, with the scales of the blocks that it touches."""
    assert spec.block is not None, spec.name
    shape, (step, grid) = spec.layout.local_shape(mesh, rank), tile_blocks(spec, mesh, rank)
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(grid, dtype=torch.float32, device=device)
    if source is None:
        return Fp8Weight(values, scales, step)
    for piece in spec.pieces(mesh, rank):
        *outer, rows, columns = piece.dst
        touched = source.fp8(piece.tensor, piece.src[0], piece.src[1], _box(values, piece))
        # A scale of the tile is that of the stored block in which its first element lies.
        at = [
            (torch.arange(0, length, by, device=touched.device) + start % of) // of
            for (start, length), by, of in zip(piece.src, step, spec.block, strict=True)
        ]
        places = ((start // by, len(i)) for (start, _), by, i in zip((rows, columns), step, at, strict=True))
        _box(scales, replace(piece, dst=(*outer, *places))).copy_(touched[at[0]][:, at[1]])
    return Fp8Weight(values, scales, step)


def _copy(source: Source, piece: Piece, tile: Tensor) -> None:
    rows, rest = piece.src[0], piece.src[1:]
    columns = rest[0] if len(rest) == 1 else (0, prod(length for _, length in rest))
    source.copy(piece.tensor, rows, columns, _box(tile, piece).view(rows[1], -1))


def _box(tile: Tensor, piece: Piece) -> Tensor:
    """What a piece fills of a tile."""
    box = tile
    for dim, (start, length) in enumerate(piece.dst):
        box = box.narrow(dim, start, length)
    # An expert's own tensor has no dim for the expert.
    return box.squeeze(0) if len(piece.dst) > len(piece.src) else box


def stored_shapes(table: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """Shape of every checkpoint tensor that the table reads: as far as the pieces of a single rank reach."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in table:
        for piece in spec.pieces(SINGLE, 0):
            ends = tuple(start + length for start, length in piece.src)
            shapes[piece.tensor] = tuple(map(max, shapes.get(piece.tensor, ends), ends))
    return shapes


def check(source: Source, table: Sequence[TensorSpec]) -> None:
    """Raises `ModelError` for missing, misshapen and unexpected tensors, all together.

    What is not expected may change the answer (a bias, another norm), so it is refused unless it is known not to.
    """
    expected = stored_shapes(table)
    wrong = [
        f"'{name}' in {source.where(name)}: found {found or 'nothing'}, expected {shape}"
        for name, shape in expected.items()
        if (found := source.shape(name)) != shape
    ]
    wrong += [
        f"'{name}' in {source.where(name)}: nothing here uses it"
        for name in source.leftovers(expected)
        if not _needless(name, expected)
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ModelError(f"the checkpoint does not fit its config.json: {'; '.join(wrong[:SHOWN])}{more}")


def unserved(name: str, expected: Iterable[str]) -> bool:
    """True for a tensor of a layer of which nothing is expected: after the last one, drafting, or seeing."""
    layer = LAYER.match(name)
    return layer is not None and not any(other.startswith(layer.group()) for other in expected)


def _needless(name: str, expected: Mapping[str, object]) -> bool:
    """True for a tensor that is known and not wanted: `KNOWN`, `OF_CACHE`; a tied head; layers that are not served."""
    tied = name == "lm_head.weight" and name not in expected
    return bool(KNOWN.search(name) or OF_CACHE.search(name)) or tied or unserved(name, expected)
