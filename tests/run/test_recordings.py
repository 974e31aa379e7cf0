"""Promise: no first token waits for a graph. What is met often is recorded, each size once, and the rest while idle."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from run.test_loop import SHORT, Engine, prompt
from run.test_runner import step
from tessera.core.config.types import GraphSizes
from tessera.core.errors import CapacityError
from tessera.core.messages import Outbound, Outputs, Submit
from tessera.run.graphs import Size, padded
from tessera.run.recordings import MEETINGS, Recordings

SIZES = GraphSizes(rows=(1, 2, 4), segments=(2, 4), tokens=(8, 16))
DECODES = [Size(rows, rows, True) for rows in SIZES.rows]
WAIT_S = 30.0


def decode(rows: int) -> list[tuple[int, int, int, bool]]:
    return [(row, 4, 1, True) for row in range(rows)]


RANGES = st.one_of(
    st.integers(1, 5).map(decode), st.integers(2, 20).map(lambda length: [(0, 0, length, True)]), st.just([])
)


@given(st.lists(RANGES, max_size=40))
def test_every_size_is_recorded_once_and_never_before_it_ran(met: list[list[tuple[int, int, int, bool]]]) -> None:
    recordings, recorded, ran = Recordings(SIZES), set(), dict.fromkeys([None, *DECODES], 0)
    for index, ranges in enumerate(met):
        one = step(index, ranges)
        size = padded(one, SIZES)
        found = recordings.due(one)
        assert found in (None, size)
        if found is not None:
            assert found not in recorded
            assert ran[found] == MEETINGS
            recorded.add(found)
        ran[size] = ran.get(size, 0) + 1
        assert size is None or (size in recorded) == (ran[size] > MEETINGS)
    left = recordings.num_left
    rest = [recordings.rest() for _ in range(left)]
    assert None not in rest
    assert len(set(rest)) == len(rest)
    assert not recorded & set(rest)
    assert recorded | set(rest) == set(DECODES) | {size for size in ran if size is not None}
    assert recordings.rest() is None


def test_what_was_met_goes_first_then_the_largest_then_upwards() -> None:
    recordings = Recordings(SIZES)
    recordings.due(step(0, decode(2)))
    assert not recordings.under_way
    assert [recordings.rest() for _ in range(3)] == [DECODES[1], DECODES[2], DECODES[0]]
    assert recordings.under_way


def test_a_server_that_decodes_nothing_records_only_what_it_met() -> None:
    recordings = Recordings(SIZES, decodes=False)
    assert (recordings.num_left, recordings.rest()) == (0, None)
    recordings.due(step(0, decode(2)))
    assert recordings.rest() == DECODES[1]


def test_nothing_is_recorded_while_it_is_held() -> None:
    recordings = Recordings(SIZES)
    recordings.held = True
    assert not any(recordings.due(step(i, decode(2))) for i in range(2 * MEETINGS + 2))
    assert recordings.rest() is None
    assert recordings.num_left == 0
    recordings.held = False
    assert recordings.num_left == len(DECODES)


def test_the_loop_records_while_nothing_runs_and_first_tokens_do_not_wait() -> None:
    """Sizes are recorded before anybody asks, between requests, and never between a request and its first token."""
    recorded, done = [], threading.Event()

    def react(engine: Engine, message: Outbound) -> None:
        if isinstance(message, Outputs) and any(output.finish for output in message.items):
            done.set()

    engine = Engine(react)
    sizes = GraphSizes(rows=(1, 2, 4), segments=(2, 4), tokens=(64,))
    engine.core.recordings.__init__(sizes)
    engine.core.runner.record = recorded.append
    engine.core.post(Submit("a", prompt(1), SHORT))
    with engine:
        assert done.wait(WAIT_S)
        assert not [size for size in recorded if size.num_tokens > 1], "the prompt's size was met once"
        waited = threading.Event()
        while engine.core.recordings.num_left:
            assert not waited.wait(0.01)
    assert set(recorded) == {*DECODES, Size(2, 64)}
    assert len(recorded) == 4
    assert not engine.core.recordings.under_way


def test_without_memory_for_more_the_engine_goes_on_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    done, tried = threading.Event(), list[Size]()

    def react(engine: Engine, message: Outbound) -> None:
        if isinstance(message, Outputs) and any(output.finish for output in message.items):
            done.set()

    def refuse(size: Size) -> None:
        tried.append(size)
        raise CapacityError("rank 0: Tried to allocate 2 GiB")

    engine = Engine(react)
    engine.core.recordings.__init__(SIZES)
    engine.core.runner.record = refuse
    with engine:
        waited = threading.Event()
        while engine.core.recordings.num_left:
            assert not waited.wait(0.01)
        engine.core.post(Submit("a", prompt(1), SHORT))
        assert done.wait(WAIT_S)
    assert tried == [DECODES[2], DECODES[0]], "the largest, and what is smaller, once each"
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "steps of 4 tokens (4 ranges) as a CUDA graph: rank 0: Tried to allocate 2 GiB." in caplog.text


@given(st.lists(RANGES, max_size=30), st.lists(st.sampled_from([*DECODES, Size(2, 8), Size(4, 16)]), min_size=1))
def test_what_there_is_no_memory_for_is_not_asked_again_nor_anything_larger(
    met: list[list[tuple[int, int, int, bool]]], dropped: list[Size]
) -> None:
    recordings = Recordings(SIZES)
    for size in dropped:
        recordings.drop(size)
    least = min(size.all_tokens for size in dropped)
    found = [recordings.due(step(index, ranges)) for index, ranges in enumerate(met)]
    found += [recordings.rest() for _ in range(recordings.num_left)]
    assert recordings.num_left == 0
    assert recordings.rest() is None
    assert all(size is None or size.all_tokens < least for size in found)
    assert {size for size in DECODES if size.all_tokens < least} <= set(found)
