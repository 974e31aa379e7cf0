"""Promise: what a step's ranges say of each token is the same from the device's columns as from the host's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.ops.expand import Columns, expand_reference
from tessera.ops.segments import make_segments
from tessera.ops.triton_expand import expand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, PAGE, PAGES = 6, 4, 8
RANGES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=ROWS)


@pytest.mark.parametrize("version", [expand_reference, expand])
@settings(max_examples=30, deadline=None)
@given(ranges=RANGES, more=st.integers(0, 5), empty=st.integers(0, 3), seed=st.integers(0, 99))
def test_it_is_what_segments_say(version, ranges, more: int, empty: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 99, (ROWS + 1, PAGE * PAGES)).astype(np.int32)
    pages = rng.integers(1, 99, (ROWS + 1, PAGES)).astype(np.int32)
    rows = rng.permutation(ROWS)[: len(ranges)]
    starts, lengths = (np.array([r[i] for r in ranges], np.int32) for i in (0, 1))
    pad = np.zeros(empty + (not len(ranges)), np.int32)
    total = int(lengths.sum())
    columns = [np.append(rows, pad + ROWS), np.append(starts, pad), np.append(lengths, pad), np.append(rows, pad)]
    columns += [columns[0], np.concatenate([[0], np.cumsum(np.append(lengths, pad))])]
    host = np.zeros(Columns.size(len(columns[0])), np.int32)
    for column, place in zip(columns, Columns.places(len(columns[0])), strict=True):
        host[place] = column
    packed = torch.from_numpy(host).to(DEVICE)
    table = [torch.from_numpy(x).to(DEVICE) for x in (tokens, pages)]
    num_tokens = max(total + more, 1)
    found = version(Columns.split(packed, len(columns[0])), num_tokens, *table, PAGE)
    expected = make_segments(starts, lengths, pages[rows], rows, PAGE)
    for name in ("positions", "rows", "write_page", "write_offset"):
        assert getattr(found, name)[:total].tolist() == getattr(expected, name).tolist(), name
    ids = tokens[rows[expected.rows.numpy()], expected.positions.numpy()]
    assert found.tokens[:total].tolist() == ids.tolist()
    assert found.page_table[: len(rows)].tolist() == pages[rows].tolist()
    for name in ("tokens", "positions", "write_page", "write_offset"):
        assert not getattr(found, name)[total:].any(), name
