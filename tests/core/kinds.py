"""Layouts of every tensor kind in the design, for meshes with an axis `attn`, and helpers that apply them."""

from __future__ import annotations

import numpy as np

from tessera.core.layout import Dim, Layout, Section, padded, whole
from tessera.core.mesh import Axis, Mesh
from tessera.core.reshard import Copy, reshard


def line(size: int) -> Mesh:
    """`size` ranks on the one axis `attn`."""
    return Mesh(size, (Axis("attn", size),))


def cut(name: str, *sections: Section, summed: bool = False) -> Dim:
    """A dim cut along `attn`."""
    return Dim(name, sections, "attn", summed)


def kinds(size: int) -> dict[str, Layout]:
    """One layout of each kind as it would be on `size` ranks. Only vocabulary and experts depend on the size."""
    vocab, padding = padded(50, size)
    spread = tuple(tuple(range(rank, 48, size)) for rank in range(size))
    return {
        "gqa q|k|v rows": Layout(
            (cut("qkv", Section("q", 48, 2), Section("k", 4, 2, 48), Section("v", 4, 2, 48)), whole("hidden", 3))
        ),
        "gqa pages": Layout(
            (whole("kv", 2), cut("head", Section("kv_head", 4, 1, 48)), whole("token", 2), whole("d", 2))
        ),
        "o_proj": Layout((whole("hidden", 3), cut("head", Section("q", 48, 2), summed=True))),
        "gdn conv state": Layout(
            (cut("channel", Section("q", 4, 3, 8), Section("k", 4, 3, 8), Section("v", 8, 2)), whole("k-1", 3))
        ),
        "gdn state": Layout((cut("head", Section("v", 16, 1)), whole("dk", 2), whole("dv", 2))),
        "mamba2 x|B|C": Layout(
            (cut("channel", Section("x", 16, 2), Section("B", 2, 3, 16), Section("C", 2, 3, 16)), whole("k-1", 2))
        ),
        "mla latent": Layout((whole("token", 2), Dim("latent", (Section("latent", 1, 5), Section("rope", 1, 2))))),
        "gate|up": Layout((cut("inter", Section("gate", 48), Section("up", 48)), whole("hidden", 2))),
        "experts": Layout(
            (cut("expert", Section("expert", 48, 1, None, spread)), whole("inter", 2), whole("hidden", 2))
        ),
        "vocabulary": Layout((cut("vocab", Section("vocab", vocab, 1, None, None, padding)), whole("hidden", 2))),
        "layers": Layout((cut("layer", Section("layer", 48)), whole("hidden", 2))),
        "fp8 scales": Layout((cut("block", Section("gate", 12), Section("up", 12)), whole("block_in", 2))),
    }


def numbered(layout: Layout) -> np.ndarray:
    """The whole tensor, each element a number that tells its coordinates (the same under any padding)."""
    grids = np.meshgrid(*(np.arange(n) for n in layout.shape), indexing="ij")
    return sum(grid * 1009**i for i, grid in enumerate(grids))


def shard(tensor: np.ndarray, layout: Layout, mesh: Mesh, rank: int) -> np.ndarray:
    """The tile of `rank`."""
    for dim, runs in enumerate(layout.runs(mesh, rank)):
        index = np.concatenate([np.arange(run.start, run.start + run.length) for run in runs])
        tensor = np.take(tensor, index, axis=dim)
    return tensor


def gather(tiles: list[np.ndarray], layout: Layout, mesh: Mesh) -> np.ndarray:
    """The whole tensor from all tiles; -1 where no tile has an element."""
    out = np.full(layout.shape, -1)
    for rank, tile in enumerate(tiles):
        index = [
            np.concatenate([np.arange(r.start, r.start + r.length) for r in runs]) for runs in layout.runs(mesh, rank)
        ]
        out[np.ix_(*index)] = tile
    return out


def apply(
    copies: list[Copy], tiles: list[np.ndarray], layout: Layout, mesh: Mesh
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs the copies: the tiles of the destination (-1: not written) and how often each element was written."""
    out = [np.full(layout.local_shape(mesh, r), -1) for r in range(mesh.size)]
    count = [np.zeros(layout.local_shape(mesh, r), int) for r in range(mesh.size)]
    for copy in copies:
        src = tuple(slice(s.src, s.src + s.length) for s in copy.box)
        dst = tuple(slice(s.dst, s.dst + s.length) for s in copy.box)
        assert out[copy.dst][dst].shape == tiles[copy.src][src].shape, "a copy leaves its tile"
        out[copy.dst][dst] = tiles[copy.src][src]
        count[copy.dst][dst] += 1
    return out, count


def tiles_exactly(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int = 0) -> bool:
    """True when `reshard` writes each real destination element once, from the right source element."""
    tiles = [shard(numbered(src), src, src_mesh, r) for r in range(src_mesh.size)]
    out, count = apply(reshard(src, src_mesh, dst, dst_mesh, turn), tiles, dst, dst_mesh)
    real = numbered(src).shape
    for rank in range(dst_mesh.size):
        wanted = shard(numbered(dst), dst, dst_mesh, rank)
        inside = np.ones(wanted.shape, bool)
        for dim, length in enumerate(real):
            inside &= (wanted // 1009**dim) % 1009 < length
        if not (np.array_equal(out[rank][inside], wanted[inside]) and (count[rank][inside] == 1).all()):
            return False
    return True
