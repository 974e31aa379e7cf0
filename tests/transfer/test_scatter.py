"""Many runs by few operations: the same bytes as one by one. On CPU; the device only is faster."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.transfer import scatter
from tessera.transfer.scatter import copy_runs

SIZE = 5000


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    """Runs of a few lengths on a grid, as layouts make them, that do not overlap at their destination."""
    rows = []
    for region in (4, 5):
        grid = draw(st.sampled_from([1, 2, 6, 8, 48, 500]))
        places = draw(st.lists(st.integers(0, SIZE // grid - 1), unique=True, max_size=20))
        for place, after in pairwise([*sorted(places), SIZE // grid]):
            length = grid * draw(st.sampled_from([n for n in (0, 1, 2, 5) if n <= after - place]))
            source = grid * draw(st.integers(0, (SIZE - length) // grid))
            rows.append((draw(st.sampled_from([1, 2])), source, region, grid * place, length))
    return np.array(draw(st.permutations(rows)), np.int64).reshape(-1, 5)


@given(batches(), st.sampled_from([1, 64, 400, scatter.LONG]), st.sampled_from([1, 300, scatter._TABLE]))
def test_it_copies_what_a_loop_copies(batch: np.ndarray, long: int, table: int) -> None:
    rng = np.random.default_rng(0)
    src = {n: torch.from_numpy(rng.integers(0, 256, SIZE, np.uint8)) for n in (1, 2)}
    dst = {n: torch.zeros(SIZE, dtype=torch.uint8) for n in (4, 5)}
    wanted = {n: memory.clone() for n, memory in dst.items()}
    for source, at, region, to, length in batch.tolist():
        wanted[region][to : to + length] = src[source][at : at + length]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "LONG", long)
        patch.setattr(scatter, "_TABLE", table)
        for _ in copy_runs(batch, src, dst):
            pass
    assert all(torch.equal(dst[n], wanted[n]) for n in dst)


def test_it_gives_chances_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "LONG", 100)
    monkeypatch.setattr(scatter, "CALL", 250)
    batch = np.array([[0, 100 * i, 0, 100 * i, 100] for i in range(10)], np.int64)
    src, dst = {0: torch.ones(1000, dtype=torch.uint8)}, {0: torch.zeros(1000, dtype=torch.uint8)}
    done = [int(dst[0].sum()) for _ in copy_runs(batch, src, dst)]
    assert done == [300, 600, 900, 1000]


def test_a_table_of_an_odd_place_in_memory_has_narrow_words() -> None:
    memory = torch.arange(101, dtype=torch.uint8)[1:]
    target = torch.zeros(100, dtype=torch.uint8)
    batch = np.array([[0, 8 * i, 0, 96 - 8 * i - 8, 8] for i in range(12)], np.int64)
    for _ in copy_runs(batch, {0: memory}, {0: target}):
        pass
    assert target[:96].view(12, 8).flip(0).reshape(-1).tolist() == list(range(1, 97))
