"""Segments: every tensor against its definition, token by token; parts are segments of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.ops.segments import Segments, make_segments

RANGES = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=6)


def _make(ranges: list[tuple[int, int]], page_size: int) -> tuple[Segments, np.ndarray]:
    starts, lengths = np.array(ranges, np.int32).T
    pages = int(-(-(starts + lengths).max() // page_size))
    tables = np.random.default_rng(0).permutation(np.arange(1, 1 + pages * len(ranges), dtype=np.int32))
    tables = tables.reshape(len(ranges), pages)
    return make_segments(starts, lengths, tables, np.arange(len(ranges)) + 3, page_size), tables


def _check(segments: Segments, ranges: list[tuple[int, int]], tables: np.ndarray, page_size: int) -> None:
    tokens = [(row, start + i) for row, (start, length) in enumerate(ranges) for i in range(length)]
    assert segments.num_segments == len(ranges)
    assert segments.num_tokens == len(tokens)
    assert segments.rows.tolist() == [row for row, _ in tokens]
    assert segments.positions.tolist() == [at for _, at in tokens]
    assert segments.write_page.tolist() == [tables[row, at // page_size] for row, at in tokens]
    assert segments.write_offset.tolist() == [at % page_size for _, at in tokens]
    assert segments.starts.tolist() == segments.host_starts.tolist() == [start for start, _ in ranges]
    assert segments.lengths.tolist() == segments.host_lengths.tolist() == [length for _, length in ranges]
    assert segments.cu_lengths.tolist() == np.cumsum([0, *segments.host_lengths]).tolist()
    assert segments.max_length == max(length for _, length in ranges)


@given(RANGES, st.sampled_from([1, 4, 16]))
def test_every_token_knows_its_place(ranges: list[tuple[int, int]], page_size: int) -> None:
    segments, tables = _make(ranges, page_size)
    _check(segments, ranges, tables, page_size)
    assert torch.equal(segments.page_table, torch.from_numpy(tables))
    assert segments.slots.tolist() == [3 + i for i in range(len(ranges))]


@given(RANGES, st.sampled_from([1, 16]), st.data())
def test_a_part_is_segments_of_its_own(ranges: list[tuple[int, int]], page_size: int, data: st.DataObject) -> None:
    segments, tables = _make(ranges, page_size)
    first = data.draw(st.integers(0, len(ranges) - 1))
    last = data.draw(st.integers(first + 1, len(ranges)))
    part = segments.part(first, last)
    _check(part, ranges[first:last], tables[first:last], page_size)
    assert part.slots.tolist() == [3 + i for i in range(first, last)]
    assert segments.positions[segments.tokens_of(first, last)].tolist() == part.positions.tolist()
    assert segments.part(first, last) is part


def test_made_once_per_step() -> None:
    segments, _ = _make([(0, 3)], 4)
    made = [segments.once("key", object) for _ in range(2)]
    assert made[0] is made[1]
    assert segments.once("other", object) is not made[0]


def test_no_slot_is_the_scratch_slot() -> None:
    assert make_segments([0], [1], [[1]], [-1], 4).slots.tolist() == [0]


@pytest.mark.parametrize(("starts", "lengths", "match"), [([0], [0], "empty range"), ([9], [4], "do not reach")])
def test_our_own_mistakes_are_seen(starts: list[int], lengths: list[int], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        make_segments(starts, lengths, [[1, 2]], [1], 4)
