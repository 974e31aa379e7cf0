"""Promise 2, exact tiling: every move between two layouts writes each element once, from the right place."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.kinds import apply, cut, gather, kinds, line, numbered, shard, tiles_exactly
from tessera.core import reshard as algebra
from tessera.core.errors import LayoutError
from tessera.core.layout import Dim, Layout, Section, Stored, padded, whole
from tessera.core.mesh import Axis, Mesh, instance_mesh
from tessera.core.reshard import Copy, Span, flat, merged, reshard

SIZES = range(1, 17)


def fits(layout: Layout, size: int) -> bool:
    try:
        layout.check(line(size))
    except LayoutError:
        return False
    return True


def valid_pairs(kind: str) -> list[tuple[int, int]]:
    return [(a, b) for a, b in product(SIZES, SIZES) if fits(kinds(a)[kind], a) and fits(kinds(b)[kind], b)]


@pytest.mark.parametrize("kind", kinds(1))
def test_every_pair_of_sizes_reshards_exactly(kind: str) -> None:
    pairs = valid_pairs(kind)
    assert len(pairs) >= 16, "most sizes are refused: the test would prove little"
    wrong = [(a, b) for a, b in pairs if not tiles_exactly(kinds(a)[kind], line(a), kinds(b)[kind], line(b))]
    assert not wrong


@pytest.mark.parametrize("kind", kinds(1))
def test_shards_of_every_size_gather_to_the_whole(kind: str) -> None:
    for size in SIZES:
        layout = kinds(size)[kind]
        if fits(layout, size):
            whole_tensor = numbered(layout)
            tiles = [shard(whole_tensor, layout, line(size), r) for r in range(size)]
            assert [t.shape for t in tiles] == [layout.local_shape(line(size), r) for r in range(size)]
            assert np.array_equal(gather(tiles, layout, line(size)), whole_tensor)


@pytest.mark.parametrize("kind", ["gate|up", "layers", "fp8 scales", "vocabulary"])
def test_sizes_that_do_not_divide_each_other_are_among_the_valid_ones(kind: str) -> None:
    assert any(a % b and b % a for a, b in valid_pairs(kind))


def test_six_and_four_of_twelve_heads() -> None:
    layout = Layout((cut("head", Section("q", 12, 3)), whole("d", 2)))
    assert tiles_exactly(layout, line(6), layout, line(4))
    assert tiles_exactly(layout, line(4), layout, line(6))


@st.composite
def dims(draw: st.DrawFn, axis: str | None, name: str) -> tuple[Dim, list[int]]:
    """A dim of arbitrary sections and the sizes that it can be cut for."""
    leaders = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    sections = [Section("lead", leaders, draw(st.integers(1, 4)))]
    for i in range(draw(st.integers(0, 3))):
        units = draw(st.sampled_from([u for u in range(1, leaders + 1) if leaders % u == 0]))
        sections.append(Section(f"s{i}", units, draw(st.integers(1, 4)), leaders))
    dim = Dim(name, tuple(draw(st.permutations(sections))), axis)
    return dim, [n for n in SIZES if fits(Layout((Dim(name, dim.sections, "attn"),)), n)]


@given(st.data())
def test_arbitrary_sections_on_two_axes(data: st.DataObject) -> None:
    rows, row_sizes = data.draw(dims("a", "rows"))
    cols, col_sizes = data.draw(dims("b", "cols"))
    layout = Layout((rows, cols))

    def mesh() -> Mesh:
        a = data.draw(st.sampled_from([n for n in row_sizes if n <= 6]))
        b = data.draw(st.sampled_from([n for n in col_sizes if n <= 4]))
        replicas = data.draw(st.integers(1, 2))
        return Mesh(a * b * replicas, (Axis("a", a), Axis("b", b, a)))

    src, dst = mesh(), mesh()
    assert tiles_exactly(layout, src, layout, dst, turn=data.draw(st.integers(0, 9)))
    tiles = [shard(numbered(layout), layout, src, r) for r in range(src.size)]
    assert np.array_equal(gather(tiles, layout, src), numbered(layout))


@given(st.data())
def test_flat_runs_move_the_same_elements(data: st.DataObject) -> None:
    rows, sizes = data.draw(dims("attn", "rows"))
    layout = Layout((rows, whole("d", 3)))
    a, b = (line(data.draw(st.sampled_from(sizes))) for _ in "ab")
    tiles = [shard(numbered(layout), layout, a, r) for r in range(a.size)]
    copies = reshard(layout, a, layout, b)
    wanted, _ = apply(copies, tiles, layout, b)
    out = [np.full(t.size, -1) for t in wanted]
    for copy in copies:
        for span in flat(copy.box, tiles[copy.src].shape, wanted[copy.dst].shape):
            out[copy.dst][span.dst : span.dst + span.length] = tiles[copy.src].ravel()[
                span.src : span.src + span.length
            ]
    assert all(np.array_equal(o, w.ravel()) for o, w in zip(out, wanted, strict=True))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), max_size=12))
def test_merged_keeps_the_moves_and_leaves_no_neighbours(pieces: list[tuple[int, int]]) -> None:
    spans, at = [], 0
    for src, length in pieces:
        spans.append(Span(src, at, length))
        at += length
    joined = merged(spans)

    def moves(which: list[Span]) -> list[tuple[int, int]]:
        return [(s.src + i, s.dst + i) for s in which for i in range(s.length)]

    assert moves(joined) == moves(spans)
    assert not [1 for a, b in pairwise(joined) if a.src + a.length == b.src]


def test_equal_layouts_need_one_copy_a_rank() -> None:
    layout = kinds(4)["gqa pages"]
    assert [(c.src, c.dst) for c in reshard(layout, line(4), layout, line(4))] == [(r, r) for r in range(4)]


def test_replicas_share_the_load() -> None:
    latent = kinds(1)["mla latent"]
    assert {c.src for c in reshard(latent, line(4), latent, line(4))} == set(range(4))


@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("kind", ["gqa pages", "gdn conv state", "gdn state", "mla latent"])
def test_equal_layouts_need_one_peer_a_rank_whoever_holds_replicas(kind: str, turn: int) -> None:
    layout = kinds(16)[kind]
    assert {(c.src, c.dst) for c in reshard(layout, line(16), layout, line(16), turn)} == {(r, r) for r in range(16)}


@pytest.mark.parametrize(("sources", "takers"), [(8, 1), (8, 2), (16, 4), (16, 8)])
def test_with_fewer_takers_than_replicas_neighbours_take_turns(sources: int, takers: int) -> None:
    layout, group = kinds(sources)["mla latent"], sources // takers
    seen = [{(c.src, c.dst) for c in reshard(layout, line(sources), layout, line(takers), t)} for t in range(group)]
    assert all(len(pairs) == takers for pairs in seen)
    assert set().union(*seen) == {(r, r // group) for r in range(sources)}


def test_neighbours_hold_the_same_unit() -> None:
    heads = Section("kv", 2, 1, 8)
    assert [list(heads.held(8, r)) for r in range(8)] == [[0]] * 4 + [[1]] * 4


def test_stored_order_is_undone_and_a_cut_falls_inside_the_stored_unit() -> None:
    """Qwen3-Next keeps q, k, v, z interleaved per key head: here 2 key heads, 4 value heads, widths 3 and 2."""
    stride = 2 * 3 + 2 * 2 * 2
    dim = cut(
        "qkvz",
        Section("q", 2, 3, 4, stored=Stored("t", 0, stride)),
        Section("k", 2, 3, 4, stored=Stored("t", 3, stride)),
        Section("v", 4, 2, stored=Stored("t", 6, stride, per=2)),
        Section("z", 4, 2, stored=Stored("t", 10, stride, per=2)),
    )
    names = [f"{h}{n}{i}" for h in "01" for n, w in (("q", 3), ("k", 3), ("v", 4), ("z", 4)) for i in range(w)]

    def loaded(size: int, rank: int) -> list[str]:
        part = [""] * sum(run.length for run in dim.held(size, rank))
        for run in dim.stored(size, rank):
            part[run.local : run.local + run.length] = names[run.start : run.start + run.length]
        return part

    assert loaded(2, 1) == [n for kind in "qkvz" for n in names if n[0] == "1" and n[1] == kind]
    assert loaded(4, 1) == ["0q0", "0q1", "0q2", "0k0", "0k1", "0k2", "0v2", "0v3", "0z2", "0z3"]


def test_padding_is_in_no_checkpoint_and_in_no_copy() -> None:
    units, padding = padded(10, 4)
    assert (units, padding) == (12, 2)
    dim = cut("vocab", Section("vocab", units, padding=padding, stored=Stored("embed")))
    assert sum(run.length for r in range(4) for run in dim.stored(4, r)) == 10


@pytest.mark.parametrize(
    ("layout", "size", "words"),
    [
        (
            Layout((cut("head", Section("q", 12)),)),
            8,
            ("'q'", "12", "8", "allowed: 1, 2, 3, 4, 6, 12, or a multiple of 12"),
        ),
        (Layout((cut("head", Section("kv", 4, 1, 12)),)), 6, ("'kv'", "4", "6")),
        (Layout((cut("in", Section("q", 4), summed=True),)), 8, ("'in'", "counted twice", "at most 4")),
        (Layout((cut("e", Section("e", 4, table=((0, 1), (2, 3)))),)), 4, ("'e'", "2 ranks", "4")),
        (Layout((cut("e", Section("e", 4, table=((0, 1), (2,)))),)), 2, ("'e'", "every one of 4")),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(layout: Layout, size: int, words: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as error:
        layout.check(line(size))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_two_different_tensors_are_refused() -> None:
    with pytest.raises(LayoutError, match="not the same tensor"):
        reshard(kinds(2)["gate|up"], line(2), kinds(2)["o_proj"], line(2))


def test_one_axis_cuts_one_dim() -> None:
    with pytest.raises(LayoutError, match="one axis"):
        Layout((cut("a", Section("a", 2)), cut("b", Section("b", 2))))


def test_instance_mesh_cuts_the_same_ranks_in_several_ways() -> None:
    mesh = instance_mesh(tp=8, dp=4, ep=2, dense_tp=4)
    assert (mesh.size_of("attn"), mesh.size_of("dp"), mesh.size_of("moe"), mesh.size_of("expert")) == (2, 4, 4, 2)
    assert mesh.group(5, "attn") == (4, 5)
    assert mesh.group(5, "dp") == (1, 3, 5, 7)
    assert mesh.group(5, "expert") == (1, 5)
    assert mesh.group(5, "dense") == (4, 5, 6, 7)
    with pytest.raises(LayoutError, match="does not divide"):
        instance_mesh(tp=4, dp=3)


# Mutants: the faults that the algebra rules out, put back by hand.


def test_mutant_heads_by_modulo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Section.held

    def modulo(self: Section, size: int, rank: int) -> tuple[int, ...]:
        return (rank % self.units,) if size > self.units and self.name == "kv_head" else right(self, size, rank)

    pages = kinds(1)["gqa pages"]
    src_tiles = [shard(numbered(pages), pages, line(8), r) for r in range(8)]
    monkeypatch.setattr(Section, "held", modulo)
    copies = reshard(pages, line(8), pages, line(4))
    monkeypatch.undo()
    out, _ = apply(copies, src_tiles, pages, line(4))
    assert not all(np.array_equal(out[r], shard(numbered(pages), pages, line(4), r)) for r in range(4))


def test_mutant_conv_state_as_one_block() -> None:
    conv = kinds(1)["gdn conv state"]
    block = Layout((cut("channel", Section("qkv", 1 * conv.shape[0])), conv.dims[1]))
    for a, b in [(4, 2), (2, 4), (8, 2)]:
        tiles = [shard(numbered(conv), conv, line(a), r) for r in range(a)]
        out, _ = apply(reshard(block, line(a), block, line(b)), tiles, block, line(b))
        wanted = [shard(numbered(conv), conv, line(b), r) for r in range(b)]
        misplaced = np.mean([np.mean(o != w) if o.shape == w.shape else 1.0 for o, w in zip(out, wanted, strict=True)])
        assert misplaced > 0.5, "the fault would go unseen"


def test_mutant_local_rank_as_offset() -> None:
    """Seed 2: writer r of 4 filled part r, not r mod 2, of its reader's state: out of bounds for the upper writers."""
    state = kinds(1)["gdn state"]
    tiles = [shard(numbered(state), state, line(4), r) for r in range(4)]
    wrong = []
    for copy in reshard(state, line(4), state, line(2)):
        first = copy.box[0]
        wrong.append(Copy(copy.src, copy.dst, (Span(first.src, copy.src * first.length, first.length), *copy.box[1:])))
    with pytest.raises((AssertionError, ValueError)):
        apply(wrong, tiles, state, line(2))


def test_mutant_overlapping_source_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = kinds(1)["gdn conv state"]
    assert tiles_exactly(conv, line(4), conv, line(2))
    monkeypatch.setattr(algebra, "merged", lambda spans: list(spans)[:-1])
    assert not tiles_exactly(conv, line(4), conv, line(2))
