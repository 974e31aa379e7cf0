"""Runs from another server stay inside what both sides registered, whatever their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.core.errors import PeerError
from tessera.transfer.base import PerRegion, check_runs
from tessera.transfer.mover import addressed

OWN, THEIRS = {0: 100, 7: 64}, {2: 80}
LARGEST = 2**63 - 1
NUMBERS = st.one_of(st.integers(-2, 101), st.sampled_from([LARGEST, LARGEST - 63, -LARGEST]))
RUNS = st.tuples(
    st.sampled_from([0, 7, 7, -1, 1, 8, LARGEST]), NUMBERS, st.sampled_from([2, 2, 3, -1]), NUMBERS, NUMBERS
)


@given(st.lists(RUNS, max_size=4))
def test_a_run_outside_of_a_region_is_refused(runs: list[tuple[int, ...]]) -> None:
    inside = all(
        source in OWN and target in THEIRS and length >= 0 and 0 <= at <= OWN[source] - length
        and 0 <= to <= THEIRS[target] - length
        for source, at, target, to, length in runs
    )  # fmt: skip
    table = np.array(runs, np.int64).reshape(-1, 5)
    if inside:
        check_runs(table, PerRegion(OWN, THEIRS))
    else:
        with pytest.raises(ValueError, match="region"):
            check_runs(table, PerRegion(OWN, THEIRS))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ((1, 0, 2, 0, 4), "source region 1 is not registered; registered: \\[0, 7\\]"),
        ((7, 60, 2, 0, 8), "source region 7 has 64 bytes; a run is 8 bytes from 60 on"),
        ((7, 0, 2, 80, 1), "destination region 2 has 80 bytes; a run is 1 bytes from 80 on"),
        ((7, LARGEST, 2, 0, 4), "source region 7 has 64 bytes"),
        ((7, -1, 2, 0, 4), "source region 7 has 64 bytes; a run is 4 bytes from -1 on"),
        ((7, 8, 2, 0, -4), "source region 7 has 64 bytes; a run is -4 bytes from 8 on"),
    ],
)
def test_it_says_which(run: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_runs(np.array([run]), PerRegion(OWN, THEIRS))


def test_no_region_has_an_address_by_default() -> None:
    places = PerRegion(OWN, THEIRS)
    runs = np.array([(7, 1, 2, 2, 3), (0, 1, 2, 2, 3), (7, 0, 2, 0, 1)])
    assert places(runs).tolist() == [[64, 100, 64], [80, 80, 80]]
    assert addressed(runs, places).src.tolist() == [65, 101, 64]
    assert addressed(runs, places).dst.tolist() == [82, 82, 80]
    for missing in (1, 8, 9, -1, -2, LARGEST, -LARGEST):
        for run in ((missing, 0, 2, 0, 1), (0, 0, missing, 0, 1)):
            assert -1 in places(np.array([run]))
            with pytest.raises(PeerError, match="no address"):
                addressed(np.array([run]), places)
    assert PerRegion({}, {})(np.zeros((0, 5), np.int64)).tolist() == [[], []]
    assert len(addressed(np.zeros((0, 5), np.int64), PerRegion({}, {})).src) == 0
