"""Runs from another server stay inside what both sides registered, whatever their numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.transfer.base import ByRegion, check_runs

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
        check_runs(table, ByRegion(OWN), ByRegion(THEIRS))
    else:
        with pytest.raises(ValueError, match="region"):
            check_runs(table, ByRegion(OWN), ByRegion(THEIRS))


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
        check_runs(np.array([run]), ByRegion(OWN), ByRegion(THEIRS))


def test_no_region_has_an_address_by_default() -> None:
    assert ByRegion(OWN)(np.array([7, 0, 7])).tolist() == [64, 100, 64]
    for missing in (1, 8, 9, -1, -2):
        with pytest.raises(KeyError, match=str(missing)):
            ByRegion(OWN)(np.array([0, missing]))
    assert ByRegion({})(np.zeros(0, np.int64)).tolist() == []
