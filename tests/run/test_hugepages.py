"""Weights in huge pages: whole ones only, and nothing changes but where they lie."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.run.hugepages import HUGE, gather_pages, joined, span

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@given(st.lists(st.tuples(st.integers(0, 40 * HUGE), st.integers(0, 5 * HUGE)), max_size=12))
def test_whole_pages_apart_and_inside(spans: list[tuple[int, int]]) -> None:
    """Aligned, in order, apart; every huge page of a span is in one; none reaches past the spans around it."""
    found = joined(spans)
    assert all(start % HUGE == size % HUGE == 0 < size for start, size in found)
    assert all(a + n < b for (a, n), (b, _) in pairwise(found))
    pages = {page for start, size in found for page in range(start // HUGE, (start + size) // HUGE)}
    for start, size in spans:
        assert set(range(-(-start // HUGE), (start + size) // HUGE)) <= pages
    if found:
        assert found[0][0] >= min(start for start, _ in spans)
        assert sum(found[-1]) <= max(start + size for start, size in spans)


def test_neighbours_share_a_page() -> None:
    """Two tensors that meet inside a huge page, with an allocator's header between."""
    half = HUGE // 2
    assert joined([(HUGE, HUGE + half), (2 * HUGE + half + 64, HUGE + half - 64)]) == [(HUGE, 3 * HUGE)]


@pytest.mark.skipif(sys.platform != "linux" or not ENABLED.is_file(), reason="no transparent huge pages")
def test_a_weight_moves_and_stays_the_same() -> None:
    if "[never]" in ENABLED.read_text():
        pytest.skip("this host gives no huge pages")
    weight = torch.randn(8 * HUGE // 4)
    kept, at = weight.clone(), weight.data_ptr()
    gather_pages([weight])
    assert weight.data_ptr() == at
    assert torch.equal(weight, kept)
    assert _huge_kb(at) > 0


def test_packed_weights_have_a_span() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    start, size = span(torch.randn(64, 64).to_mkldnn())
    assert start
    assert size == 64 * 64 * 4


def _huge_kb(address: int) -> int:
    """Huge pages of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and (found := re.match(r"AnonHugePages:\s+(\d+) kB", line)):
            return int(found[1])
    return 0
