"""Promise: steps of any size need few kernels, since each is compiled when it comes for the first time."""

from __future__ import annotations

import numpy as np
import pytest

from tessera.ops import triton_tiles
from tessera.ops.segments import make_segments
from tessera.ops.triton_tiles import MAX_SPLITS, splits_of


def test_splits_of_steps_of_any_size_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "num_processors", lambda device: 132)
    found = set()
    for num in range(1, 200, 7):
        for pages in (1, 3, 9, 200):
            ones = np.ones(num, np.int32)
            table = np.zeros((num, pages), np.int32)
            segments = make_segments(ones * (pages * 16 - 1), ones, table, ones, 16)
            splits = splits_of(segments, num * 2, 64, 2)
            assert 1 <= splits <= MAX_SPLITS
            assert splits <= max(1, pages * 16 // 64 + 1)
            found.add(splits)
    assert found <= {1, 2, 4, 8, 16, 32, 64}
    assert len(found) > 3
