"""Loads the weights of one rank, tensor by tensor, straight into their final storage.

For every tensor of the table the pieces that its layout names are copied into the rank's tile; a "linear" one is then
packed, which replaces the tile. At no time are there two copies of more than one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from tessera.core.errors import ModelError
from tessera.core.mesh import SINGLE, Mesh
from tessera.core.tensors import Piece, TensorSpec
from tessera.models.source import Source
from tessera.ops.linear import PackedLinear, pack
from tessera.ops.precision import wide

Progress = Callable[[int, int], None]  # elements loaded, elements in all

# Tensors of a checkpoint that need no place here: computed ones, the vision part, draft layers and their copies of
# embedding and head, scales of a quantised KV cache.
KNOWN = re.compile(
    r"rotary_emb\.inv_freq$|^(model\.)?visual\.|^mtp\.|\.shared_head\.head\.weight$|\.[kv]_scale$"
    r"|^model\.layers\.\d+\.embed_tokens\.weight$"
)
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
SHOWN = 8  # of the tensors that an error names


def load_weights(
    source: Source,
    table: Sequence[TensorSpec],
    mesh: Mesh,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pack_linear: Callable[[Tensor], PackedLinear] = pack,
    progress: Progress | None = None,
) -> dict[str, Tensor | PackedLinear]:
    """The tiles of `rank` by run-time name. Raises `ModelError` naming tensors that are missing or misshapen."""
    check(source, table)
    through = device if source.anywhere else "cpu"
    tiles: dict[str, Tensor | PackedLinear] = {}
    done, total = 0, sum(prod(t.layout.local_shape(mesh, rank)) for t in table)
    for spec in table:
        tile = load_tile(source, spec, mesh, rank, wide(dtype) if spec.wide else dtype, through).to(device)
        done += tile.numel()
        tiles[spec.name] = pack_linear(tile) if spec.role == "linear" else tile
        del tile  # where it was packed, its memory is free before the next is read
        if progress is not None:
            progress(done, total)
    return tiles


def load_tile(
    source: Source, spec: TensorSpec, mesh: Mesh, rank: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """One tile, in memory that the source can write; padding is zeros."""
    shape = spec.layout.local_shape(mesh, rank)
    padded = any(section.padding for dim in spec.layout.dims for section in dim.sections)
    tile = (torch.zeros if padded else torch.empty)(shape, dtype=dtype, device=device)
    for piece in spec.pieces(mesh, rank):
        _copy(source, piece, tile)
    return tile


def _copy(source: Source, piece: Piece, tile: Tensor) -> None:
    box = tile
    for dim, (start, length) in enumerate(piece.dst):
        box = box.narrow(dim, start, length)
    if len(piece.dst) > len(piece.src):  # an expert's own tensor has no dim for the expert
        box = box.squeeze(0)
    rows, rest = piece.src[0], piece.src[1:]
    columns = rest[0] if len(rest) == 1 else (0, prod(length for _, length in rest))
    source.copy(piece.tensor, rows, columns, box.view(rows[1], -1))


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


def _needless(name: str, expected: Mapping[str, object]) -> bool:
    """True for a tensor that is known and not wanted: see `KNOWN`; a tied head; layers after the last (drafts)."""
    if KNOWN.search(name) or (name == "lm_head.weight" and name not in expected):
        return True
    layer = LAYER.match(name)
    return layer is not None and not any(other.startswith(layer.group()) for other in expected)
