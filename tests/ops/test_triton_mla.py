"""Latent attention in Triton against its plain twins: interpreted at tiny sizes, on a GPU at those of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.cases import BATCHES, assert_close, case, ends, for_a_graph, paged
from tessera.ops import triton_latent, triton_mla
from tessera.ops.mla import mla_absorbed_reference, mla_expanded_reference
from tessera.ops.triton_latent import SHORT, LatentTiles
from tessera.ops.triton_mla import expansion, mla_absorbed, mla_expanded
from tessera.ops.triton_tiles import Tile

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [(0, 18), (33, 10), (7, SHORT), (7, SHORT + 1), (0, 1), (40, 1), (15, 1), (61, 3)]
RANGES = {"mixed": MIXED, "decodes": [(n, 1) for n in (0, 15, 16, 100)], "whole": [(0, 18), (0, 9)]}
TINY = (3, 32, 16, 16, 16)  # heads, latent rank, rope, nope, value
SCALE = 0.2


def _inputs(ranges, page_size, sizes, dtype):
    heads, rank, rope, nope, value = sizes
    c = case(ranges, page_size, device=DEVICE)
    pool = paged(c, tokens=[torch.randn(end, rank + rope, device=DEVICE).to(dtype) for end in ends(c)])
    q_nope, q_rope = (torch.randn(c.segments.num_tokens, heads, n, device=DEVICE).to(dtype) for n in (nope, rope))
    kv_b = (torch.randn(heads, nope + value, rank, device=DEVICE) * rank**-0.5).to(dtype)
    return c.segments, pool, q_nope, q_rope, kv_b


def _assert_plain(segments, pool, q_nope, q_rope, kv_b, **options):
    """Both forms, against the plain ones in fp64 on the same values."""
    wide = [x.double() for x in (q_nope, q_rope, kv_b, pool)]
    tiles = {name: options[name] for name in options if name == "tiles"}
    found = mla_expanded(q_nope, q_rope, kv_b, pool, segments, SCALE, **tiles)
    assert_close(found, mla_expanded_reference(*wide, segments, SCALE))
    found = mla_absorbed(q_nope, q_rope, kv_b, pool, segments, SCALE, **options)
    assert_close(found, mla_absorbed_reference(*wide, segments, SCALE))


@pytest.mark.parametrize(("page_size", "splits"), [(5, (1, 2)), (16, (3, 1)), (64, (2, 5))])
@pytest.mark.parametrize("ranges", RANGES)
def test_is_plain(ranges, page_size, splits):
    _assert_plain(*_inputs(RANGES[ranges], page_size, TINY, torch.float32), splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_short_ranges_whose_keys_are_split_have_tiles_of_their_own(splits):
    tiles = LatentTiles(Tile(16, 64, 4, 2), Tile(16, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2))
    inputs = _inputs(RANGES["decodes"], 16, TINY, torch.float32)
    _assert_plain(*inputs, tiles=tiles, splits=(splits, 1))


@pytest.mark.parametrize("sizes", [(2, 16, 8, 8, 8), (1, 40, 12, 24, 20)], ids=str)
def test_dims_that_are_no_powers_of_two(sizes):
    _assert_plain(*_inputs(MIXED, 16, sizes, torch.float32), splits=(3, 2))


@pytest.mark.parametrize("sizes", [TINY, (2, 40, 12, 24, 20)], ids=str)
def test_many_tiles_of_a_range(sizes):
    """Keys that all rows of a tile see and those that some do; what precedes a range among them, where that pays."""
    inputs = _inputs([(70, 40), (0, 20), (33, triton_mla.PAYS + 8)], 16, sizes, torch.bfloat16)
    segments, pool, q_nope, q_rope, kv_b = inputs
    found = mla_expanded(q_nope, q_rope, kv_b, pool, segments, SCALE, own=Tile(16, 16, 4, 2))
    wide = [x.double() for x in (q_nope, q_rope, kv_b, pool)]
    assert_close(found, mla_expanded_reference(*wide, segments, SCALE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    _assert_plain(*_inputs(MIXED, 16, TINY, dtype))


@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_pool_in_fp8(pool_dtype):
    segments, pool, *rest = _inputs(MIXED, 16, TINY, torch.bfloat16)
    _assert_plain(segments, pool.to(pool_dtype), *rest)


@pytest.mark.parametrize("most_bytes", [1 << 30, 0])
def test_what_precedes_long_ranges_is_expanded(monkeypatch, most_bytes):
    """Of some ranges, beside those of which it is not; and not at all where that would take too many bytes."""
    monkeypatch.setattr(triton_mla, "PAYS", 12)
    monkeypatch.setattr(triton_mla, "MOST_BYTES", most_bytes)
    for ranges in ([(33, 20), (7, 9), (0, 1), (5, 30), (0, 11)], [(33, 20), (0, 9)]):
        inputs = _inputs(ranges, 16, TINY, torch.float32)
        _assert_plain(*inputs)
        assert expansion(inputs[0], 1).whole == (len(ranges) == 2 and most_bytes > 0)


def test_what_is_expanded_counts_its_latents_too(monkeypatch):
    """A rank of few heads has more bytes of them than of keys and values."""
    segments, pool, q_nope, q_rope, kv_b = _inputs([(33, 20)], 16, TINY, torch.float32)
    held = 53 * (kv_b.shape[0] * kv_b.shape[1] + pool.shape[2]) * q_nope.element_size()
    monkeypatch.setattr(triton_mla, "PAYS", 12)
    gathered, gather = [], triton_mla._gathered

    def counting(pool, rows, dtype):
        gathered.append(len(rows.pages))
        return gather(pool, rows, dtype)

    monkeypatch.setattr(triton_mla, "_gathered", counting)
    for most in (held, held - 1):
        monkeypatch.setattr(triton_mla, "MOST_BYTES", most)
        mla_expanded(q_nope, q_rope, kv_b, pool, replace(segments, _made={}), SCALE)
    assert gathered == [53, 20]


@settings(max_examples=8)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 40), st.integers(1, SHORT + 4)), min_size=1, max_size=3),
    heads=st.sampled_from([1, 3, 17]),
    page_size=st.sampled_from([1, 3, 16, 32]),
    splits=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_any_batch(ranges, heads, page_size, splits):
    _assert_plain(*_inputs(ranges, page_size, (heads, *TINY[1:]), torch.float32), splits=splits)


@pytest.mark.parametrize("ranges", RANGES)
def test_reads_nothing_of_the_batch_on_the_host(ranges):
    """As in a graph: padded, wide page tables with garbage behind a sequence's pages, host numbers unknown."""
    segments, pool, q_nope, q_rope, kv_b = _inputs(RANGES[ranges], 16, TINY, torch.float32)
    pool[0] = 0
    padded = for_a_graph(segments, pages=9, padding=3, longest=max(segments.max_length, 2))
    more = [torch.cat((x, torch.randn_like(x[:5]))) for x in (q_nope, q_rope)]
    wide = [x.double() for x in (q_nope, q_rope, kv_b, pool)]
    found = mla_expanded(*more, kv_b, pool, padded, SCALE)
    assert not found.isnan().any()
    assert not found[-2:].any(), "tokens of no range come out as zeros"
    assert_close(found[: len(q_nope)], mla_expanded_reference(*wide, segments, SCALE))
    found = mla_absorbed(*more, kv_b, pool, padded, SCALE)
    assert not found.isnan().any()
    assert not found[-2:].any(), "tokens of no range come out as zeros"
    assert_close(found[: len(q_nope)], mla_absorbed_reference(*wide, segments, SCALE))


def test_strided():
    """Queries that are parts of wider ones, and a pool that is a layer's part of one allocation."""
    segments, pool, q_nope, q_rope, kv_b = _inputs(MIXED, 16, TINY, torch.float32)
    both = torch.cat((q_nope, q_rope), -1)
    layers = torch.full((len(pool), 3, *pool.shape[1:]), float("nan"), device=DEVICE)
    layers[:, 1] = pool
    _assert_plain(segments, layers[:, 1], both[..., :16], both[..., 16:], kv_b)


@pytest.mark.parametrize("few", [0, 99])
@pytest.mark.parametrize("length", [1, 3, 20])
def test_a_range_is_computed_alike_in_any_company(monkeypatch, length, few):
    """To the bit: how keys are cut depends on a sequence's own length alone."""
    monkeypatch.setattr(triton_latent, "FEW", few)
    sizes = (3, 32, 16, 32, 16)
    segments, pool, q_nope, q_rope, kv_b = _inputs([(70, length), (3, 1), (0, 2), (100, 9)], 16, sizes, torch.float32)
    kv_b[:, :32] = torch.eye(32)  # the product with it is a library's, which rounds by the number of its rows
    together = mla_absorbed(q_nope, q_rope, kv_b, pool, segments, SCALE, splits=(3, 2))
    part = segments.part(0, 1)
    alone = mla_absorbed(q_nope[:length], q_rope[:length], kv_b, pool, part, SCALE, splits=(3, 2))
    assert torch.equal(together[:length], alone)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "page_size", "dtype"),
    [
        (16, 16, torch.bfloat16),
        (16, 64, torch.bfloat16),
        (128, 64, torch.bfloat16),
        (16, 16, torch.float16),
        (16, 64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranges", BATCHES)
def test_real_sizes(ranges, heads, page_size, dtype):
    _assert_plain(*_inputs(BATCHES[ranges], page_size, (heads, 512, 64, 128, 128), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [
        LatentTiles(Tile(16, 32, 4, 4), Tile(64, 32, 8, 3), Tile(16, 64, 4, 2), Tile(16, 128, 8, 2)),
        LatentTiles(Tile(16, 128, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 3), Tile(32, 64, 4, 2)),
    ],
    ids=str,
)
def test_other_tiles(tiles):
    _assert_plain(*_inputs(BATCHES["mixed"], 64, (16, 512, 64, 128, 128), torch.bfloat16), tiles=tiles)
