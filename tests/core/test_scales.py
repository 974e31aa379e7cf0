"""Promise 1 for fp8: a shard dequantises to the bit as the whole does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim, Section, Stored
from tessera.core.scales import check_groups, scale_tile


def gate_up(rows: int) -> Dim:
    return Dim("inter", (Section("gate", rows, stored=Stored("g")), Section("up", rows, stored=Stored("u"))), "moe")


def element_scales(dim: Dim, size: int, rank: int, block: int) -> list[tuple[str, int]]:
    """The stored block of every element of a tile, one by one."""
    out: list[tuple[str, int]] = [("", -1)] * dim.local_length(size, rank)
    for run in dim.stored(size, rank):
        for i in range(run.length):
            out[run.local + i] = (run.tensor, (run.start + i) // block)
    return out


@given(st.integers(1, 24), st.sampled_from([1, 2, 4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 3))
def test_repeated_scales_are_those_of_each_element(units: int, size: int, block: int, width16: int) -> None:
    rows = units * size * 16 * width16
    dim = gate_up(rows)
    for rank in range(size):
        try:
            tile = scale_tile(dim, size, rank, block)
        except LayoutError:
            return
        repeated = np.repeat(np.arange(len(tile.blocks)), tile.step)[: dim.local_length(size, rank)]
        assert [tile.blocks[i] for i in repeated] == element_scales(dim, size, rank, block)


def test_704_columns_are_five_and_a_half_blocks() -> None:
    tile = scale_tile(gate_up(1408), 2, 1)
    assert tile.step == 64
    assert tile.blocks[:4] == (("g", 5), ("g", 6), ("g", 6), ("g", 7))


def test_a_step_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(LayoutError, match="use fewer ranks"):
        scale_tile(gate_up(136), 17, 3)


def test_activation_groups_fall_on_global_borders_or_are_refused() -> None:
    down = Dim("inter", (Section("inter", 1408),), "moe", summed=True)
    check_groups(Dim("inter", (Section("inter", 1024),), "moe"), 4)
    with pytest.raises(LayoutError, match="cuts a group of 128"):
        check_groups(down, 2)
