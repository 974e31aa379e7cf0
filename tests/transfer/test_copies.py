"""Promise 2 between servers: whatever the two layouts, each byte arrives once and from the right place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim, Layout, Section
from tessera.core.mesh import Mesh, instance_mesh
from tessera.core.reshard import Copy, Span
from tessera.core.spec import Mixer, ModelSpec
from tessera.core.tensors import cache_table
from tessera.transfer import copies
from tessera.transfer.base import PerRegion, check_runs
from tessera.transfer.copies import CopyPlan
from transfer import servers
from transfer.servers import DTYPES, FP8, HYBRID, LATENT, MODELS, Room, arrived, delta, gqa, manifest, mla, model

SIZES = range(1, 17)
ROOM = Room(0, 0, [3, 4, 7], [2, 3, 1], 2, 4)


def fits(spec: ModelSpec, attn: int) -> bool:
    """Whether a server could lay the model's caches out on so many ranks."""
    try:
        for cache in cache_table(spec, 4, DTYPES):
            cache.layout.check(instance_mesh(attn))
    except LayoutError:
        return False
    return True


@pytest.mark.parametrize("name", MODELS)
def test_every_pair_of_sizes_arrives(name: str) -> None:
    spec = MODELS[name]
    sizes = [n for n in SIZES if fits(spec, n)]
    assert len(sizes) >= 4, "most sizes are refused: the test would prove little"
    for a, b in product(sizes, sizes):
        arrived(manifest(spec, a), manifest(spec, b), ROOM)


@st.composite
def mixers(draw: st.DrawFn) -> Mixer:
    """A layer of any kind."""
    dim = draw(st.integers(1, 4))
    values = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    group = draw(st.sampled_from([g for g in range(1, values + 1) if values % g == 0]))
    kind = draw(st.sampled_from(["gqa", "delta", "mla"]))
    if kind == "mla":
        return mla(values, dim)
    if kind == "gqa":
        return gqa(values, values // group, dim)
    return delta(values // group, values, dim, draw(st.integers(1, 4)), draw(st.integers(2, 4)))


@given(st.data())
def test_random_models_arrive_between_random_servers(data: st.DataObject) -> None:
    spec = model(*data.draw(st.lists(mixers(), min_size=1, max_size=4)))
    dtypes = data.draw(st.sampled_from([DTYPES, FP8]))
    sizes = [n for n in SIZES if fits(spec, n)]
    sides = []
    for _ in "ab":
        attn, dp = data.draw(st.sampled_from(sizes)), data.draw(st.integers(1, 3))
        sides.append((manifest(spec, attn, dp, dtypes), data.draw(st.integers(0, dp - 1))))
    (source, src_dp), (destination, dst_dp) = sides
    num = data.draw(st.integers(0, 6))
    pages = [data.draw(st.permutations(range(1, 9)))[:num] for _ in "ab"]
    slots = [data.draw(st.integers(1, 4)) for _ in "ab"]
    arrived(source, destination, Room(src_dp, dst_dp, pages[0], pages[1], slots[0], slots[1]))


def test_six_and_four_ranks_of_twelve_heads() -> None:
    for a, b in ((6, 4), (4, 6)):
        arrived(manifest(MODELS["twelve heads"], a, 2), manifest(MODELS["twelve heads"], b, 3), replace(ROOM, dst_dp=2))


def test_the_tables_may_be_in_another_order() -> None:
    other = manifest(HYBRID, 2)
    members = tuple(replace_regions(m) for m in other.members)
    arrived(manifest(HYBRID, 4), manifest(HYBRID, 2, caches=other.caches[::-1], members=members), ROOM)


def replace_regions(member: servers.Member) -> servers.Member:
    """The same pools the other way round."""
    return servers.Member(member.engine, b"", member.num_pages, member.num_slots, member.regions[::-1])


@pytest.mark.parametrize("pair", [(1, 1), (4, 4), (8, 8)])
def test_equal_layouts_need_one_run_for_a_page_a_layer_and_a_rank(pair: tuple[int, int]) -> None:
    plan = CopyPlan(manifest(HYBRID, pair[0]), manifest(HYBRID, pair[1]))
    assert plan.pairs(0, 0) == tuple((r, r) for r in range(pair[0])), "each rank has one peer"
    layers = 2  # with pages
    for a, b in plan.pairs(0, 0):
        assert len(plan.paged(a, b, [1, 3, 5], [2, 4, 6])) == 3 * layers
        assert len(plan.paged(a, b, [1, 2, 3, 7], [4, 5, 6, 7])) == 2 * layers, "neighbours in both are one run"
        assert len(plan.paged(a, b, [3, 1, 2], [6, 4, 5])) == layers, "in whatever order they are named"
        assert len(plan.paged(a, b, [1, 2, 3], [6, 5, 4])) == 3 * layers, "neighbours, but the other way round"
        assert len(plan.slots(a, b, 1, 2)) == 2 * 2, "conv and state of each layer that has them"


def test_a_latent_is_sent_once_and_by_all_replicas_together() -> None:
    """Every source rank holds the whole latent. One reader: the layers take turns among the writers."""
    for attn in (1, 2, 4):
        plan = CopyPlan(manifest(LATENT, 4), manifest(LATENT, attn))
        sent = {a: len(plan.paged(a, b, [1], [1])) for a, b in plan.pairs(0, 0)}
        assert set(sent) == {0, 1, 2, 3}
        assert set(sent.values()) == {attn}, "not all do the same"
        assert sum(sent.values()) == 4 * attn, "one writer for each layer and reader"


def test_replicated_heads_are_sent_by_all_replicas_together() -> None:
    """8 ranks hold 2 heads of KV: each head has 4 writers and, with 2 ranks, one reader."""
    plan = CopyPlan(manifest(model(*[gqa(8, 2)] * 4), 8), manifest(model(*[gqa(8, 2)] * 4), 2))
    assert plan.pairs(0, 0) == tuple((r, r // 4) for r in range(8))
    assert {len(plan.paged(a, b, [1], [1])) for a, b in plan.pairs(0, 0)} == {1}


def test_pairs_are_those_of_the_two_groups() -> None:
    plan = CopyPlan(manifest(HYBRID, 2, 2), manifest(HYBRID, 4, 3))
    for src_dp, dst_dp in product(range(2), range(3)):
        pairs = plan.pairs(src_dp, dst_dp)
        assert {a for a, _ in pairs} == {2 * src_dp, 2 * src_dp + 1}
        assert {b for _, b in pairs} == {4 * dst_dp + r for r in range(4)}
    assert plan.readers(3) == (2, 3, 6, 7, 10, 11), "the second half of every group"


def test_runs_keep_the_contract_of_the_engines() -> None:
    plan = CopyPlan(manifest(HYBRID, 4), manifest(HYBRID, 2))
    sides = plan._source.manifest, plan._destination.manifest
    for a, b in plan.pairs(0, 0):
        own, theirs = (
            {r.number: r.num_bytes for r in s.members[n].regions} for s, n in zip(sides, (a, b), strict=True)
        )
        for runs in (plan.paged(a, b, [1, 8], [8, 2]), plan.slots(a, b, 4, 4), plan.paged(a, b, [], [])):
            assert runs.dtype == np.int64
            check_runs(runs, PerRegion(own, theirs))


@pytest.mark.parametrize(
    ("src", "dst", "words"),
    [
        ([1], [1, 2], "1 pages of the source for 2"),
        ([0], [1], "source: pages 0 to 0 asked, it has 1 to 8"),
        ([1], [9], "destination: pages 9 to 9 asked, it has 1 to 8"),
        ([1, 2], [3, 3], "named twice"),
    ],
)
def test_pages_that_cannot_be_are_refused(src: list[int], dst: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CopyPlan(manifest(HYBRID, 1), manifest(HYBRID, 1)).paged(0, 0, src, dst)


# The faults that others have shipped, put back.

Reshard = Callable[[Layout, Mesh, Layout, Mesh, int], list[Copy]]


def broken(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Reshard], Reshard]) -> None:
    """Plans copies with a fault."""
    copies._moves.cache_clear()
    monkeypatch.setattr(copies, "reshard", fault(copies.reshard))


@pytest.fixture(autouse=True)
def no_memory() -> None:
    """Moves planned with a fault must not stay."""
    copies._moves.cache_clear()


def test_mutant_local_rank_as_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 2: writer r of 4 filled part r, not r mod 2, of its reader's state."""

    def fault(right: Reshard) -> Reshard:
        def wrong(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int) -> list[Copy]:
            out = []
            for c in right(src, src_mesh, dst, dst_mesh, turn):
                first = c.box[0]
                out.append(Copy(c.src, c.dst, (Span(first.src, c.src * first.length, first.length), *c.box[1:])))
            return out

        return wrong

    spec = model(delta(8, 8))
    arrived(manifest(spec, 4), manifest(spec, 2), ROOM)
    broken(monkeypatch, fault)
    with pytest.raises(AssertionError, match=r"is wrong|not each byte once|leaves the destination"):
        arrived(manifest(spec, 4), manifest(spec, 2), ROOM)


@pytest.mark.parametrize("pair", [(4, 2), (2, 4), (1, 4)])
def test_mutant_conv_state_as_one_block(monkeypatch: pytest.MonkeyPatch, pair: tuple[int, int]) -> None:
    """The window cut as if q, k and v were one row of channels."""

    def block(layout: Layout) -> Layout:
        first, *rest = layout.dims
        return Layout((Dim(first.name, (Section("channels", first.length),), first.axis), *rest))

    def fault(right: Reshard) -> Reshard:
        return lambda src, src_mesh, dst, dst_mesh, turn: right(block(src), src_mesh, block(dst), dst_mesh, turn)

    spec = model(delta(8, 8))
    arrived(manifest(spec, pair[0]), manifest(spec, pair[1]), ROOM)
    broken(monkeypatch, fault)
    with pytest.raises(AssertionError, match=r"conv on rank \d is wrong"):
        arrived(manifest(spec, pair[0]), manifest(spec, pair[1]), ROOM)


@pytest.mark.parametrize("pair", [(8, 4), (2, 8)])
def test_mutant_heads_by_modulo(monkeypatch: pytest.MonkeyPatch, pair: tuple[int, int]) -> None:
    """Replicated heads of KV taken as rank % heads, not rank // replicas."""
    held = Section.held

    def modulo(self: Section, size: int, rank: int) -> tuple[int, ...]:
        return (rank % self.units,) if size > self.units else tuple(held(self, size, rank))

    def fault(right: Reshard) -> Reshard:
        def wrong(*arguments: object) -> list[Copy]:
            with monkeypatch.context() as patch:
                patch.setattr(Section, "held", modulo)
                return right(*arguments)  # type: ignore[arg-type]

        return wrong

    spec = model(gqa(16, 4))
    arrived(manifest(spec, pair[0]), manifest(spec, pair[1]), ROOM)
    broken(monkeypatch, fault)
    with pytest.raises(AssertionError, match=r"kv on rank \d is wrong"):
        arrived(manifest(spec, pair[0]), manifest(spec, pair[1]), ROOM)


def test_mutant_every_replica_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latent sent by each source rank: the right bytes, four times."""

    def fault(right: Reshard) -> Reshard:
        def wrong(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int) -> list[Copy]:
            return [replace(c, src=r) for c in right(src, src_mesh, dst, dst_mesh, turn) for r in range(src_mesh.size)]

        return wrong

    broken(monkeypatch, fault)
    with pytest.raises(AssertionError, match="not each byte once"):
        arrived(manifest(LATENT, 4), manifest(LATENT, 2), ROOM)
