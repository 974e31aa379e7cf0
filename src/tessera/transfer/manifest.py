"""What two servers show each other when they first meet: what each keeps of a sequence, how it is cut, where it lies.

A pair whose caches do not tile each other is refused at that moment by `compare`, naming the tensors and both sides;
whatever passes needs no further check (`copies.py`). On the wire a manifest is msgpack.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import msgspec
from torch import Tensor

from tessera.core.errors import ConfigError, Conflict, LayoutError, PeerError
from tessera.core.layout import whole
from tessera.core.mesh import Mesh
from tessera.core.reshard import same_tensor
from tessera.core.tensors import DTYPE_BYTES, CacheSpec
from tessera.transfer.base import Engine

PROTOCOL = 4  # of the manifest and of what follows it; raised with every change that an older server would misread
SAME_MODEL = "Serve the same model on both sides."
MOST_NAMED = 8  # tensors that one reason is told of by name


class Region(msgspec.Struct, frozen=True):
    """Memory of a rank: the number by which its engine knows it, and its size in bytes."""

    number: int
    num_bytes: int


class Member(msgspec.Struct, frozen=True):
    """One rank: how to reach its memory. `regions`: its pools, in the order of the manifest's `caches`.

    `engine`: kind of transfer engine; `endpoint`: what that engine needs to connect.
    """

    engine: str
    endpoint: bytes
    num_pages: int
    num_slots: int
    regions: tuple[Region, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One server. `instance`: unique to its start; `weights`: tells checkpoints and the model's dtype apart; `parts`:
    what is kept in fp32 until all of a sum is there (`core/parts.py`); `page_size` in tokens.

    `caches`: the cache table (`core/tensors.py`), layouts and dtypes and all; `members`: one for each rank of `mesh`.
    """

    protocol: int = PROTOCOL
    instance: str
    weights: str
    parts: str
    mesh: Mesh
    page_size: int
    caches: tuple[CacheSpec, ...]
    members: tuple[Member, ...]

    def group(self, dp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the sequences of a DP rank, in the order in which attention is cut over them."""
        return self.mesh.group(self.mesh.group(0, "dp")[dp_rank], "attn")

    @property
    def num_dp_ranks(self) -> int:
        """Groups of ranks, each with sequences of its own."""
        return self.mesh.size_of("dp")


def new_instance() -> str:
    """A name for this start of a server."""
    return secrets.token_hex(8)


def member(
    kind: str, engine: Engine, caches: Sequence[CacheSpec], pools: Mapping[str, Tensor], num_pages: int, num_slots: int
) -> Member:
    """Registers the pools of a rank with its engine, region i for cache i, and says how they are reached."""
    regions = []
    for number, spec in enumerate(caches):
        engine.register(number, pools[spec.name])
        regions.append(Region(number, pools[spec.name].nbytes))
    return Member(kind, engine.endpoint(), num_pages, num_slots, tuple(regions))


def encode(manifest: Manifest) -> bytes:
    """As msgpack."""
    return msgspec.msgpack.encode(manifest)


class _Version(msgspec.Struct):
    protocol: int


def decode(data: bytes) -> Manifest:
    """The manifest of a peer. `PeerError` when it is of another protocol, or none at all."""
    try:
        found = msgspec.msgpack.decode(data, type=_Version).protocol
        if found == PROTOCOL:
            return msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise PeerError(f"what the peer sent is no manifest of protocol {PROTOCOL}: {error}") from error
    raise PeerError(
        f"the peer speaks hand-over protocol {found}, this server {PROTOCOL}: run one release on both sides"
    )


def compare(source: Manifest, destination: Manifest) -> None:
    """Returns when state of `source` can continue on `destination`.

    Otherwise raises one `ConfigError` with every reason, each with the tensors that it concerns and both sides.
    """
    conflicts = differences(source, destination)
    for side, manifest in (("prefill", source), ("decode", destination)):
        conflicts += _inside(side, manifest)
    if conflicts:
        raise ConfigError(conflicts)


def differences(source: Manifest, destination: Manifest) -> list[Conflict]:
    """Why state of `source` cannot continue on `destination`, whatever memory their ranks have: nothing has to run."""
    return [*_whole(source, destination), *_tables(source, destination)]


def _both(what: str, source: object, destination: object, remedy: str) -> Conflict:
    return Conflict((what,), f"prefill has {source}, decode has {destination}", remedy)


def _whole(source: Manifest, destination: Manifest) -> Iterator[Conflict]:
    """What is said once of a server."""
    if source.protocol != destination.protocol:
        yield _both("protocol", source.protocol, destination.protocol, "Run one release on both sides.")
    if source.weights != destination.weights:
        yield _both("weights", source.weights, destination.weights, "Serve the same checkpoint on both sides.")
    if source.parts != destination.parts:
        remedy = "Give the same --parts-dtype on both sides; else it follows the device and --fp8-gemm-backend."
        yield _both("--parts-dtype", source.parts, destination.parts, remedy)
    kinds = [sorted({m.engine for m in manifest.members}) for manifest in (source, destination)]
    if len({kind for side in kinds for kind in side}) > 1:
        remedy = "Give one --disaggregation-transfer-backend on both sides."
        yield _both("transfer engine", kinds[0], kinds[1], remedy)


def _tables(source: Manifest, destination: Manifest) -> Iterator[Conflict]:
    """What is said of each cache, one conflict for all caches that it holds for."""
    mine, theirs = ({spec.name: spec for spec in manifest.caches} for manifest in (source, destination))
    for side, here, there in (("prefill", mine, theirs), ("decode", theirs, mine)):
        if only := [name for name in here if name not in there]:
            yield Conflict(_named(only), f"only {side} has it", SAME_MODEL)
    found: dict[tuple[str, str], list[str]] = {}
    for name in [spec.name for spec in source.caches if spec.name in theirs]:
        for apart in _apart(mine[name], theirs[name], source.page_size, destination.page_size):
            found.setdefault(apart, []).append(name)
    for (reason, remedy), names in found.items():
        yield Conflict(_named(names), reason, remedy)


def _named(names: Sequence[str]) -> tuple[str, ...]:
    """A model has many layers, which mostly differ alike."""
    more = len(names) - MOST_NAMED
    return (*names[:MOST_NAMED], f"{more} more") if more > 0 else tuple(names)


def _apart(a: CacheSpec, b: CacheSpec, a_page: int, b_page: int) -> Iterator[tuple[str, str]]:
    """(reason, remedy) of everything for which one cache cannot continue as the other."""
    if a.kind != b.kind:
        yield f"prefill keeps it by {a.kind}, decode by {b.kind}", SAME_MODEL
    if a.dtype != b.dtype:
        remedy = "Give the same --dtype, --kv-cache-dtype and --mamba-ssm-dtype on both sides."
        yield f"prefill keeps {a.dtype}, decode {b.dtype}", remedy
    if a.kind == b.kind == "page" and a_page != b_page:
        yield f"prefill has pages of {a_page} tokens, decode of {b_page}", "Give the same --page-size on both sides."
        a, b = _of_a_token(a), _of_a_token(b)
    try:
        same_tensor(a.layout, b.layout)
    except LayoutError as error:
        yield str(error), SAME_MODEL


def _of_a_token(page: CacheSpec) -> CacheSpec:
    """What else there is to differ, where pages have other sizes."""
    dims = (whole(dim.name, 1) if dim.name == "token" else dim for dim in page.layout.dims)
    return replace(page, layout=replace(page.layout, dims=tuple(dims)))


def _inside(side: str, manifest: Manifest) -> Iterator[Conflict]:
    """What does not fit inside one manifest: a peer may be of another release, or mistaken."""
    remedy = "This is a fault of that server: please report it."
    if len(manifest.members) != manifest.mesh.size:
        found = f"{len(manifest.members)} members for {manifest.mesh.size} ranks"
        yield Conflict((f"manifest of {side}",), found, remedy)
        return
    wrong: dict[str, list[str]] = {}
    for i, spec in enumerate(manifest.caches):
        if reason := _misfit(manifest, i, spec):
            wrong.setdefault(reason, []).append(spec.name)
    for reason, names in wrong.items():
        yield Conflict(_named(names), f"{side}: {reason}", remedy)


def _misfit(manifest: Manifest, index: int, spec: CacheSpec) -> str | None:
    if others := {str(dim.axis) for dim in spec.layout.dims} - {"None", "attn"}:
        return f"cut along {sorted(others)}, but a sequence is handed over along 'attn' only"
    if spec.dtype not in DTYPE_BYTES:
        return f"dtype {spec.dtype} is not known here; known: {', '.join(DTYPE_BYTES)}"
    try:
        spec.layout.check(manifest.mesh)
    except LayoutError as error:
        return str(error)
    for rank, held in enumerate(manifest.members):
        count = held.num_pages if spec.kind == "page" else held.num_slots
        expected = count * spec.bytes_per_unit(manifest.mesh, rank)
        found = held.regions[index].num_bytes if index < len(held.regions) else None
        if found != expected:
            return f"rank {rank} has a region of {found} bytes, {count} {spec.kind}s take {expected}"
    return None
