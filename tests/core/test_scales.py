"""Promise 1 for fp8: a shard dequantises to the bit as the whole does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import LayoutError
from tessera.core.layout import Dim, Section, Stored
from tessera.core.scales import check_groups, scale_step


def gate_up(rows: int) -> Dim:
    return Dim("inter", (Section("gate", rows, stored=Stored("g")), Section("up", rows, stored=Stored("u"))), "moe")


def element_scales(dim: Dim, size: int, rank: int, block: int) -> list[tuple[str, int]]:
    """The stored block of every element of a tile, one by one."""
    out: list[tuple[str, int]] = [("", -1)] * sum(run.length for run in dim.held(size, rank))
    for run in dim.stored(size, rank):
        for i in range(run.length):
            out[run.local + i] = (run.tensor, (run.start + i) // block)
    return out


@given(st.integers(1, 24), st.sampled_from([1, 2, 4, 8]), st.sampled_from([32, 64, 128]), st.integers(1, 3))
def test_a_scale_repeats_over_elements_of_one_stored_block(units: int, size: int, block: int, width16: int) -> None:
    dim = gate_up(units * size * 16 * width16)
    together = scale_step(dim, size, range(size), block)  # steps of 16 are never refused
    for rank in range(size):
        step, scales = scale_step(dim, size, [rank], block), element_scales(dim, size, rank, block)
        assert step % together == 0, "what holds for all ranks holds for each"
        assert all(len(set(scales[at : at + step])) == 1 for at in range(0, len(scales), step))


def test_704_columns_are_five_and_a_half_blocks() -> None:
    dim = gate_up(1408)
    assert scale_step(dim, 2, [1], 128) == 64
    assert element_scales(dim, 2, 1, 128)[: 4 * 64 : 64] == [("g", 5), ("g", 6), ("g", 6), ("g", 7)]


def test_a_step_that_no_kernel_takes_is_refused() -> None:
    with pytest.raises(LayoutError, match="use fewer ranks"):
        scale_step(gate_up(136), 17, range(17), 128)


def test_activation_groups_fall_on_global_borders_or_are_refused() -> None:
    down = Dim("inter", (Section("inter", 1408),), "moe", summed=True)
    check_groups(Dim("inter", (Section("inter", 1024),), "moe"), 4)
    with pytest.raises(LayoutError, match="cuts a group of 128"):
        check_groups(down, 2)
