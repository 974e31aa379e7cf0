"""Many runs in one launch: the same bytes as one by one. In the interpreter here; the device only is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tessera.transfer import triton_copy
from tessera.transfer.base import PerRegion
from tessera.transfer.mover import Regions, addressed, starts

SIZE = 5000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def copied(batch: np.ndarray, src: Regions, dst: Regions) -> Iterator[None]:
    """Copies, call by call."""
    runs = addressed(batch, PerRegion(starts(src), starts(dst)))
    for wait in triton_copy.Copier(DEVICE, lambda: torch.cuda.synchronize if DEVICE.type == "cuda" else int)(runs):
        wait()
        yield


@st.composite
def batches(draw: st.DrawFn) -> np.ndarray:
    """Runs of a few lengths on a grid, as layouts make them, that do not overlap at their destination."""
    rows = []
    grid = draw(st.sampled_from([1, 2, 4, 8, 16, 48, 500]))
    for region in (4, 5):
        places = draw(st.lists(st.integers(0, SIZE // grid - 1), unique=True, max_size=10))
        for place, after in pairwise([*sorted(places), SIZE // grid]):
            length = grid * draw(st.sampled_from([n for n in (0, 1, 2, 5) if n <= after - place]))
            source = grid * draw(st.integers(0, (SIZE - length) // grid))
            rows.append((draw(st.sampled_from([1, 2])), source, region, grid * place, length))
    return np.array(draw(st.permutations(rows)), np.int64).reshape(-1, 5)


@given(batches(), st.sampled_from([64, 256]), st.sampled_from([1, 3]), st.sampled_from([1, 700, triton_copy.CALL]))
def test_it_copies_what_a_loop_copies(batch: np.ndarray, piece: int, programs: int, call: int) -> None:
    rng = np.random.default_rng(0)
    src = {n: torch.from_numpy(rng.integers(0, 256, SIZE, np.uint8)).to(DEVICE) for n in (1, 2)}
    dst = {n: torch.zeros(SIZE, dtype=torch.uint8, device=DEVICE) for n in (4, 5)}
    wanted = {n: memory.clone() for n, memory in dst.items()}
    for source, at, region, to, length in batch.tolist():
        wanted[region][to : to + length] = src[source][at : at + length]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PIECE", piece), ("PROGRAMS", programs), ("CALL", call)):
            patch.setattr(triton_copy, name, value)
        for _ in copied(batch, src, dst):
            pass
    assert all(torch.equal(dst[n], wanted[n]) for n in dst)


def test_it_gives_chances_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_copy, "CALL", 250)
    batch = np.array([[0, 100 * i, 0, 100 * i, 100] for i in range(10)], np.int64)
    src = {0: torch.ones(1000, dtype=torch.uint8, device=DEVICE)}
    dst = {0: torch.zeros(1000, dtype=torch.uint8, device=DEVICE)}
    done = [int(dst[0].sum()) for _ in copied(batch, src, dst)]
    assert done == [200, 400, 600, 800, 1000]


def test_memory_at_an_odd_place_is_copied_in_narrow_words() -> None:
    memory = torch.arange(101, dtype=torch.uint8, device=DEVICE)[1:]
    target = torch.zeros(100, dtype=torch.uint8, device=DEVICE)
    batch = np.array([[0, 16, 0, 32, 16], [0, 0, 0, 64, 16]], np.int64)
    list(copied(batch, {0: memory}, {0: target}))
    assert target[32:48].tolist() == memory[16:32].tolist()
    assert target[64:80].tolist() == memory[:16].tolist()


def test_a_table_is_not_written_while_the_one_before_it_may_be_read() -> None:
    """One table after the other; the last to be told that it is free again is the first to be taken anew."""
    waited: list[int] = []
    numbers = count()

    def mark() -> Callable[[], None]:
        number = next(numbers)
        return lambda: waited.append(number)

    copier = triton_copy.Copier(DEVICE, mark)  # 0: made ready
    memory = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
    runs = addressed(np.array([[0, 0, 0, 32, 16]]), PerRegion(starts({0: memory}), starts({0: memory})))
    for _ in range(triton_copy.DESKS + 2):
        list(copier(runs))
    assert waited == [0, 1, 2]
