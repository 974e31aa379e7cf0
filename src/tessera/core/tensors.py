"""Tensors of a rank as data: what a weight is (`TensorSpec`, tabled in `core/weights.py`) and what each layer caches.

A layout says how a tensor is cut; its sections say where the checkpoint keeps each unit. Pools, prefix cache, transfer
and rollback iterate over `cache_table`; none knows a model's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby, product
from math import prod
from typing import Literal

from tessera.core.layout import Dim, Layout, Section, Stored, whole
from tessera.core.mesh import Mesh
from tessera.core.spec import AttentionSpec, DeltaSpec, Mixer, MLASpec, ModelSpec

DTYPE_BYTES = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}


FP8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class Piece:
    """A box to copy: `src` in checkpoint tensor `tensor`, `dst` in the rank's tile; (start, length) per dim.

    An indexed dim (experts saved one by one) has no place in `src`: its unit is in the tensor's name.
    """

    tensor: str
    src: tuple[tuple[int, int], ...]
    dst: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A run-time tensor. `role`: what it is to the ops, which may keep "linear" [out, in] and "experts" packed.

    `wide`: kept in fp32 or wider whatever the model's dtype; else in the model's dtype. `block`: kept in fp8, with a
    scale for each block of so many rows and columns of what is stored; but for the sections `plain` of its rows.
    """

    name: str
    layout: Layout
    role: Literal["plain", "linear", "experts", "embedding"] = "plain"
    wide: bool = False
    block: tuple[int, int] | None = None
    plain: tuple[str, ...] = ()

    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensor in pieces of rows that are kept alike, all in blocks or none, in order."""
        if not self.plain:
            return (self,)
        *outer, rows, columns = self.layout.dims
        parts = []
        for plain, sections in groupby(rows.sections, lambda section: section.name in self.plain):
            layout = Layout((*outer, replace(rows, sections=tuple(sections)), columns))
            parts.append(replace(self, layout=layout, block=None if plain else self.block, plain=()))
        return tuple(parts)

    def gives_parts(self, mesh: Mesh) -> bool:
        """Whether products with it are parts of a sum; see `Mesh.adds_up`."""
        columns = self.layout.dims[-1]
        return columns.summed and mesh.adds_up(columns.axis)

    def pieces(self, mesh: Mesh, rank: int) -> Iterator[Piece]:
        """What fills the tile of `rank`, each stored element once; padding is left to whoever allocates (zeros)."""
        choices: list[list[tuple[str | None, tuple[int, int] | None, tuple[int, int], dict[str, int]]]] = []
        for dim in self.layout.dims:
            size, at = mesh.size_of(dim.axis), mesh.coordinate(rank, dim.axis)
            if dim.indexed:
                units = [u for section in dim.sections for u in section.held(size, at)]
                choices.append([(None, None, (i, 1), {dim.name: u}) for i, u in enumerate(units)])
            elif any(section.stored for section in dim.sections):
                stored = dim.stored(size, at)
                choices.append([(r.tensor, (r.start, r.length), (r.local, r.length), {}) for r in stored])
            else:
                held = dim.held(size, at)
                choices.append([(None, (r.start, r.length), (r.local, r.length), {}) for r in held])
        for picks in product(*choices):
            index = {name: unit for *_, units in picks for name, unit in units.items()}
            (tensor,) = {name for name, *_ in picks if name is not None}
            src = tuple(span for _, span, *_ in picks if span is not None)
            yield Piece(tensor.format(**index), src, tuple(span for _, _, span, _ in picks))


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """State of one layer. kind "page": `layout` is that of one page of tokens; "slot": of one sequence's state.

    The pool of a rank is `[num_pages or num_slots, *layout.local_shape(mesh, rank)]` of `dtype`.
    """

    name: str
    kind: Literal["page", "slot"]
    layout: Layout
    dtype: str

    def bytes_per_unit(self, mesh: Mesh, rank: int = 0) -> int:
        """Bytes of one page or slot on a rank."""
        return prod(self.layout.local_shape(mesh, rank)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class CacheDtypes:
    """Dtypes of KV (and MLA latent) pages, of conv windows and of delta-rule states."""

    kv: str
    conv: str
    state: str


def wide_dtype(dtype: str) -> str:
    """The wider of float32 and `dtype`: what "in fp32" means, so that float64 runs stay float64."""
    return dtype if dtype == "float64" else "float32"


def cache_dtypes(spec: ModelSpec, dtype: str, kv: str | None = None, state: str | None = None) -> CacheDtypes:
    """Dtypes for a model run in `dtype`: pages and windows in it unless `kv` says otherwise; states as the checkpoint's
    `mamba_ssm_dtype` or `state` says, but float64 in a float64 run that asks for nothing."""
    declared = next((la.mixer.state_dtype for la in spec.layers if isinstance(la.mixer, DeltaSpec)), "float32")
    return CacheDtypes(kv or dtype, dtype, state or ("float64" if dtype == "float64" else declared))


def cache_table(spec: ModelSpec, page_size: int, dtypes: CacheDtypes) -> tuple[CacheSpec, ...]:
    """The caches of all layers, in order. `page_size` in tokens."""
    of_each = (_caches(f"layers.{i}", layer.mixer, page_size, dtypes) for i, layer in enumerate(spec.layers))
    return tuple(chain.from_iterable(of_each))


def conv_channels(d: DeltaSpec, tensor: str | None = None) -> tuple[Section, ...]:
    """The conv channels q | k | v; q and k heads stay beside their v heads. `tensor` keeps them in this order."""
    keys = d.num_key_heads * d.key_dim
    at = [Stored(tensor, start) if tensor else None for start in (0, keys, 2 * keys)]
    return (
        Section("q", d.num_key_heads, d.key_dim, leaders=d.num_value_heads, stored=at[0]),
        Section("k", d.num_key_heads, d.key_dim, leaders=d.num_value_heads, stored=at[1]),
        Section("v", d.num_value_heads, d.value_dim, stored=at[2]),
    )


def _caches(name: str, mixer: Mixer, page_size: int, dtypes: CacheDtypes) -> list[CacheSpec]:
    token = whole("token", page_size)
    if isinstance(mixer, AttentionSpec):
        heads = Dim("heads", (Section("heads", mixer.num_kv_heads, leaders=mixer.num_heads),), "attn")
        page = Layout((whole("kv", 2), heads, token, whole("dim", mixer.head_dim)))
        return [CacheSpec(f"{name}.kv", "page", page, dtypes.kv)]
    if isinstance(mixer, MLASpec):
        entry = Dim("entry", (Section("latent", 1, mixer.latent_dim), Section("rope", 1, mixer.rope.dim)))
        return [CacheSpec(f"{name}.latent", "page", Layout((token, entry)), dtypes.kv)]
    window = Layout((Dim("channels", conv_channels(mixer), "attn"), whole("window", mixer.kernel - 1)))
    heads = Dim("heads", (Section("heads", mixer.num_value_heads),), "attn")
    state = Layout((heads, whole("key", mixer.key_dim), whole("value", mixer.value_dim)))
    return [
        CacheSpec(f"{name}.conv", "slot", window, dtypes.conv),
        CacheSpec(f"{name}.state", "slot", state, dtypes.state),
    ]
