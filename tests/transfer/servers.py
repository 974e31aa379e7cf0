"""Servers as data, for tests: models with few heads, their manifests, pools as numpy bytes, and copies run by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.kinds import shard
from tessera.core.mesh import instance_mesh
from tessera.core.spec import AttentionSpec, DeltaSpec, DenseSpec, LayerSpec, Mixer, MLASpec, ModelSpec, RopeSpec
from tessera.core.tensors import DTYPE_BYTES, CacheDtypes, CacheSpec, cache_table
from tessera.transfer.base import Runs
from tessera.transfer.copies import CopyPlan
from tessera.transfer.manifest import Manifest, Member, Region

Bytes = NDArray[np.uint8]
DTYPES = CacheDtypes("bfloat16", "bfloat16", "float32")
FP8 = CacheDtypes("float8_e4m3fn", "bfloat16", "float32")
ROPE = RopeSpec(2, 1e4)


def gqa(heads: int, kv_heads: int, dim: int = 3) -> AttentionSpec:
    """Grouped query attention."""
    return AttentionSpec(heads, kv_heads, dim, ROPE)


def mla(heads: int = 16, latent: int = 5) -> MLASpec:
    """Latent attention: whole on every rank."""
    return MLASpec(heads, None, latent, 2, 3, ROPE, 1.0)


def delta(keys: int, values: int, key_dim: int = 3, value_dim: int = 2, kernel: int = 4) -> DeltaSpec:
    """Gated delta net."""
    return DeltaSpec(keys, values, key_dim, value_dim, kernel)


def model(*mixers: Mixer) -> ModelSpec:
    """A model of these layers."""
    layers = tuple(LayerSpec(mixer, DenseSpec(8)) for mixer in mixers)
    return ModelSpec("Test", "test", 8, 10, layers, 1e-6, 100)


HYBRID = model(delta(4, 8), gqa(8, 2), delta(4, 8), gqa(8, 2))
LATENT = model(*(mla() for _ in range(4)))
MODELS = {
    "hybrid": HYBRID,
    "latent": LATENT,
    "gqa": model(gqa(16, 4), gqa(16, 4)),
    "twelve heads": model(gqa(12, 12), gqa(24, 12), delta(12, 12)),
    "one kv head": model(gqa(16, 1), gqa(16, 1)),
    "grouped delta": model(delta(2, 16), gqa(16, 2)),
}


def manifest(
    spec: ModelSpec,
    attn: int,
    dp: int = 1,
    dtypes: CacheDtypes = DTYPES,
    page_size: int = 4,
    num_pages: int = 9,
    num_slots: int = 5,
    **more: Any,
) -> Manifest:
    """A server with `attn` ranks in each of `dp` groups. Regions are numbered by rank, to be told apart."""
    mesh = instance_mesh(attn * dp, dp)
    table = cache_table(spec, page_size, dtypes)

    def regions(rank: int) -> tuple[Region, ...]:
        return tuple(
            Region(100 * rank + i, (num_pages if c.kind == "page" else num_slots) * c.bytes_per_unit(mesh, rank))
            for i, c in enumerate(table)
        )

    members = tuple(Member("local", b"", num_pages, num_slots, regions(rank)) for rank in range(mesh.size))
    fields = {"instance": "a", "weights": "w", "parts": "bfloat16", "mesh": mesh, "page_size": page_size}
    return Manifest(**{**fields, "caches": table, "members": members, **more})


def wholes(spec: CacheSpec, units: int, seed: int) -> Bytes:
    """Whole units of a cache, one after the other, as random bytes: `[units, *whole shape, bytes]`."""
    rng = np.random.default_rng(seed)
    shape = (units, *spec.layout.shape, DTYPE_BYTES[spec.dtype])
    return rng.integers(0, 256, shape, dtype=np.uint8)


def tile(side: Manifest, spec: CacheSpec, unit: Bytes, rank: int) -> Bytes:
    """What a rank holds of a whole unit, as a row of bytes."""
    return np.ascontiguousarray(shard(unit, spec.layout, side.mesh, rank)).reshape(-1)


@dataclass
class Memory:
    """The regions of all ranks of a server: `bytes[rank][region]`, and how often each byte was written."""

    side: Manifest

    def __post_init__(self) -> None:
        self.bytes = [{r.number: np.zeros(r.num_bytes, np.uint8) for r in m.regions} for m in self.side.members]
        self.writes = [{n: np.zeros(len(b), int) for n, b in regions.items()} for regions in self.bytes]

    def unit(self, rank: int, index: int, unit: int) -> slice:
        """Where a page or slot of cache `index` lies in its region."""
        held = self.side.members[rank]
        count = held.num_pages if self.side.caches[index].kind == "page" else held.num_slots
        size = held.regions[index].num_bytes // count
        return slice(unit * size, (unit + 1) * size)

    def region(self, rank: int, index: int) -> Bytes:
        """The region of cache `index`."""
        return self.bytes[rank][self.side.members[rank].regions[index].number]

    def count(self, rank: int, index: int) -> NDArray[np.int64]:
        """How often each byte of it was written."""
        return self.writes[rank][self.side.members[rank].regions[index].number]


def copy(runs: Runs, src: Memory, src_rank: int, dst: Memory, dst_rank: int) -> None:
    """Runs the copies; AssertionError when one leaves its region."""
    for source, at, region, to, length in runs.tolist():
        mine, theirs = src.bytes[src_rank][source], dst.bytes[dst_rank][region]
        assert 0 <= at <= at + length <= len(mine), "a copy leaves the source"
        assert 0 <= to <= to + length <= len(theirs), "a copy leaves the destination"
        theirs[to : to + length] = mine[at : at + length]
        dst.writes[dst_rank][region][to : to + length] += 1


@dataclass(frozen=True)
class Room:
    """A request: its DP ranks, its pages on both sides, its slots on both sides."""

    src_dp: int
    dst_dp: int
    src_pages: list[int]
    dst_pages: list[int]
    src_slot: int
    dst_slot: int

    def units(self, kind: str) -> list[tuple[int, int]]:
        """(unit of the source, unit of the destination) of a kind of cache."""
        pages = list(zip(self.src_pages, self.dst_pages, strict=True))
        return pages if kind == "page" else [(self.src_slot, self.dst_slot)]


def filled(source: Manifest, room: Room) -> tuple[Memory, list[Bytes]]:
    """A server whose group holds the room's sequence, random bytes, and the whole units of each cache."""
    src, truth = Memory(source), []
    for i, spec in enumerate(source.caches):
        units = room.units(spec.kind)
        truth.append(wholes(spec, len(units), seed=i))
        for rank in source.group(room.src_dp):
            for whole, (unit, _) in zip(truth[-1], units, strict=True):
                src.region(rank, i)[src.unit(rank, i, unit)] = tile(source, spec, whole, rank)
    return src, truth


def check(dst: Memory, room: Room, source: Manifest, truth: list[Bytes]) -> list[list[NDArray[np.int64]]]:
    """AssertionError unless the destination's group holds what sharding the whole there gives, and the rest is zero.

    Gives, by rank and cache, 1 for each byte that was to be written.
    """
    names = {spec.name: i for i, spec in enumerate(source.caches)}
    wanted_writes = []
    for rank in range(dst.side.mesh.size):
        wanted_writes.append([])
        for i, spec in enumerate(dst.side.caches):
            written = np.zeros(len(dst.region(rank, i)), int)
            if rank in dst.side.group(room.dst_dp):
                for whole, (_, unit) in zip(truth[names[spec.name]], room.units(spec.kind), strict=True):
                    where = dst.unit(rank, i, unit)
                    wanted = tile(dst.side, spec, whole, rank)
                    assert np.array_equal(dst.region(rank, i)[where], wanted), f"{spec.name} on rank {rank} is wrong"
                    written[where] = 1
            assert not dst.region(rank, i)[written == 0].any(), (
                f"{spec.name} on rank {rank}: something else was written"
            )
            wanted_writes[-1].append(written)
    return wanted_writes


def arrived(source: Manifest, destination: Manifest, room: Room) -> None:
    """Hands the room over by memory copies. AssertionError unless `check` passes and each byte was written once."""
    src, truth = filled(source, room)
    dst = Memory(destination)
    plan = CopyPlan(source, destination)
    for a, b in plan.pairs(room.src_dp, room.dst_dp):
        copy(plan.paged(a, b, room.src_pages, room.dst_pages), src, a, dst, b)
        copy(plan.slots(a, b, room.src_slot, room.dst_slot), src, a, dst, b)
    for rank, wanted in enumerate(check(dst, room, source, truth)):
        for i, written in enumerate(wanted):
            name = destination.caches[i].name
            assert np.array_equal(dst.count(rank, i), written), f"{name} on rank {rank}: not each byte once"
