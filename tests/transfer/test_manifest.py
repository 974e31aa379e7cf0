"""A pair of servers that does not fit is refused when the two meet: every reason at once, by name, with both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tessera.core.errors import ConfigError, PeerError
from tessera.core.mesh import instance_mesh
from tessera.core.tensors import cache_table
from tessera.transfer.copies import CopyPlan
from tessera.transfer.host import HostMover
from tessera.transfer.manifest import PROTOCOL, Manifest, Member, compare, decode, encode, member, new_instance
from transfer.movers import Make, making
from transfer.servers import DTYPES, FP8, HYBRID, LATENT, delta, gqa, manifest, model

engines = pytest.fixture(making)


def test_a_manifest_survives_the_wire() -> None:
    for sent in (manifest(HYBRID, 4, 2), manifest(LATENT, 1, 1, FP8)):
        assert decode(encode(sent)) == sent


def test_servers_of_any_sizes_of_one_model_fit() -> None:
    compare(manifest(HYBRID, 4, 2, num_pages=9), manifest(HYBRID, 2, 3, num_pages=20, num_slots=7, instance="b"))


REFUSED: dict[str, tuple[Manifest, tuple[str, ...]]] = {
    "page size": (manifest(HYBRID, 2, page_size=8), ("layers.1.kv with layers.3.kv", "pages of 4 tokens", "of 8")),
    "dtype of kv": (manifest(HYBRID, 2, 1, FP8), ("layers.1.kv with layers.3.kv", "bfloat16", "float8_e4m3fn")),
    "weights": (manifest(HYBRID, 2, weights="v"), ("weights: prefill has w, decode has v",)),
    "parts of sums": (
        manifest(HYBRID, 2, parts="float32"),
        ("--parts-dtype: prefill has bfloat16, decode has float32", "Give the same --parts-dtype on both sides"),
    ),
    "protocol": (manifest(HYBRID, 2, protocol=PROTOCOL + 1), (f"has {PROTOCOL}, decode has {PROTOCOL + 1}",)),
    "another shape": (
        manifest(model(delta(4, 8), gqa(8, 2, 4), delta(4, 8), gqa(8, 2)), 2),
        ("layers.1.kv:", "not the same tensor", "('dim', 1, 3)", "('dim', 1, 4)"),
    ),
    "another kind": (
        manifest(model(delta(4, 8), gqa(8, 2), gqa(8, 2), gqa(8, 2)), 2),
        ("layers.2.conv with layers.2.state: only prefill has it", "layers.2.kv: only decode has it"),
    ),
    "a rank that is missing": (manifest(HYBRID, 2, members=manifest(HYBRID, 1).members), ("1 members for 2 ranks",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    other, words = REFUSED[name]
    with pytest.raises(ConfigError) as error:
        compare(manifest(HYBRID, 4), other)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_all_that_differs_of_a_tensor_is_told() -> None:
    """Its dtype, its pages and its heads; and only that, though each of it makes another layout."""
    with pytest.raises(ConfigError) as error:
        compare(manifest(model(gqa(8, 2)), 2), manifest(model(gqa(8, 2, 4)), 2, 1, FP8, page_size=8))
    told = [(conflict.flags, conflict.reason) for conflict in error.value.conflicts]
    assert {flags for flags, _ in told} == {("layers.0.kv",)}
    assert [reason.split(":")[0] for _, reason in told] == [
        "prefill keeps bfloat16, decode float8_e4m3fn",
        "prefill has pages of 4 tokens, decode of 8",
        "not the same tensor",
    ]
    with pytest.raises(ConfigError) as error:
        compare(manifest(HYBRID, 4), manifest(HYBRID, 2, page_size=8))
    assert "not the same tensor" not in str(error.value)


def test_of_many_tensors_that_differ_alike_the_first_are_named() -> None:
    many = model(*(gqa(8, 2) for _ in range(11)))
    with pytest.raises(ConfigError) as error:
        compare(manifest(many, 2), manifest(many, 2, page_size=8))
    (conflict,) = error.value.conflicts
    assert conflict.flags == (*(f"layers.{i}.kv" for i in range(8)), "3 more")
    assert conflict.reason == "prefill has pages of 4 tokens, decode of 8"


def on_engines(sent: Manifest, *kinds: str) -> Manifest:
    """The same, with other transfer engines on its ranks."""
    members = [msgspec.structs.replace(m, engine=kind) for m, kind in zip(sent.members, kinds, strict=True)]
    return msgspec.structs.replace(sent, members=tuple(members))


def test_both_sides_need_one_kind_of_engine() -> None:
    with pytest.raises(ConfigError, match=r"transfer engine: prefill has \['local'\], decode has \['nixl'\]"):
        compare(manifest(HYBRID, 2), on_engines(manifest(HYBRID, 2), "nixl", "nixl"))


def test_a_region_of_another_size_is_told() -> None:
    first, second = manifest(HYBRID, 2).members
    short = msgspec.structs.replace(second, num_slots=second.num_slots - 1)
    with pytest.raises(ConfigError) as error:
        compare(manifest(HYBRID, 4), manifest(HYBRID, 2, members=(first, short)))
    assert "layers.0.conv with layers.2.conv: decode: rank 1 has a region of" in str(error.value)
    assert "layers.0.state with layers.2.state" in str(error.value)


def test_what_a_mistaken_peer_says_is_told() -> None:
    right = manifest(HYBRID, 2)
    wrong = [replace(spec, dtype="int3") if spec.name == "layers.0.conv" else spec for spec in right.caches]
    with pytest.raises(ConfigError, match="dtype int3 is not known"):
        compare(right, msgspec.structs.replace(right, caches=tuple(wrong)))
    on_tp = replace(right.caches[0].layout.dims[0], axis="tp")
    layout = replace(right.caches[0].layout, dims=(on_tp, *right.caches[0].layout.dims[1:]))
    cut = (replace(right.caches[0], layout=layout), *right.caches[1:])
    with pytest.raises(ConfigError, match=r"cut along \['tp'\]"):
        compare(right, msgspec.structs.replace(right, caches=cut))


def test_all_reasons_come_together() -> None:
    with pytest.raises(ConfigError) as error:
        CopyPlan(manifest(HYBRID, 4), manifest(HYBRID, 2, 1, FP8, weights="v"))
    assert [c.flags for c in error.value.conflicts] == [("weights",), ("layers.1.kv", "layers.3.kv")]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"protocol": PROTOCOL}), b"\x93abc"])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="no manifest"):
        decode(data)


def test_a_layout_that_cannot_be_is_refused_when_it_is_read() -> None:
    plain: Any = msgspec.msgpack.decode(encode(manifest(HYBRID, 1)))
    plain["caches"][0]["layout"]["dims"][0]["sections"][0]["units"] = 0
    with pytest.raises(PeerError, match="0 units"):
        decode(msgspec.msgpack.encode(plain))


def test_another_protocol_is_refused_before_it_is_read() -> None:
    with pytest.raises(PeerError, match=f"protocol 99, this server {PROTOCOL}"):
        decode(msgspec.msgpack.encode({"protocol": 99, "something": "else"}))


def test_every_start_has_a_name_of_its_own() -> None:
    assert len({new_instance() for _ in range(100)}) == 100


def test_a_rank_registers_its_pools_in_the_order_of_the_table(engines: Make) -> None:
    mesh, table = instance_mesh(2), cache_table(HYBRID, 4, DTYPES)
    pools = {
        spec.name: torch.zeros(
            (9 if spec.kind == "page" else 5, *spec.layout.local_shape(mesh, 1)), dtype=getattr(torch, spec.dtype)
        )
        for spec in table
    }
    engine = engines(HostMover())
    made = member("local", engine, table, pools, 9, 5)
    assert [r.number for r in made.regions] == list(range(len(table)))
    assert made.endpoint == engine.endpoint()
    whole = manifest(HYBRID, 2)
    compare(whole, msgspec.structs.replace(whole, members=(whole.members[0], made)))
    first = Member("local", b"", 9, 5, whole.members[0].regions)
    plan = CopyPlan(msgspec.structs.replace(whole, members=(first, made)), whole)
    assert set(plan.paged(1, 1, np.array([2]), [3])[:, 0].tolist()) == {2, 5}
