"""Promise: whatever the network and the other side do, a hand-over ends in bounded time, with the right answer or a
clear error, and every page and slot is free again."""

from __future__ import annotations

import random

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from plan.pair import Pair, config, play
from tessera.core.messages import HandoverTimes
from tessera.plan.handoff import (
    Action,
    Computed,
    HandoffConfig,
    Heard,
    Inner,
    Joined,
    Opened,
    Prompt,
    Reserve,
    Sent,
    Tell,
    Ticketed,
    Wire,
    Written,
)
from tessera.plan.handoff_giver import Giver
from tessera.plan.log import replay
from tessera.plan.step import Clock, ints

FEW = 300  # in `make test`; the profile of `make test-faults` has more
TAPES = st.lists(st.integers(0, 2**16 - 1), min_size=30, max_size=240)
KINDS = st.sampled_from(
    [
        ({}, {}),
        ({"max_in_flight": 2}, {"max_in_flight": 2}),
        ({"num_slots": 0, "prefix_cache": True, "max_in_flight": 2}, {"num_slots": 0, "max_in_flight": 2}),
        ({"num_slots": 0}, {"num_slots": 0, "prefix_cache": True, "max_in_flight": 2, "mixed": True}),
        ({"num_dp": 2, "max_in_flight": 2}, {"num_dp": 3}),
        ({"num_pages": 12, "max_running": 2, "num_slots": 3}, {"num_pages": 12, "num_slots": 3, "max_in_flight": 2}),
        ({"num_slots": 3}, {"num_pages": 10, "num_slots": 4, "max_running": 3, "mixed": True, "max_in_flight": 3}),
    ]
)


def test_a_hand_over_replays_from_the_event_logs() -> None:
    rng = random.Random(3)
    pair = Pair(config("prefill", max_in_flight=2), config("decode", num_dp=2, max_in_flight=2))
    play(pair, [rng.randrange(1 << 16) for _ in range(600)])
    for side in (*pair.sides.values(), *pair.dead):
        steps = [step for step in replay(side.log, check=True) if step is not None]
        assert [step.index for step in steps] == [step.index for step in side.steps]
        assert not side.gives or any(part.sends for step in steps for part in step.parts)


# A prompt arrives at the end of its last page, takes a row, and is preempted before a step has told ranks of that row.
NEVER_TOLD = [
    0, 1, 0, 0, 0, 15918, 0, 618, 0, 0, 13031, 0, 0, 26369, 198, 0, 126, 18, *[0] * 8, 117, 0, 0, 1, 258, 0, 0, 0, 8,
]  # fmt: skip
TIGHT = {"num_slots": 3}, {"num_pages": 10, "num_slots": 4, "max_running": 3, "mixed": True, "max_in_flight": 3}


@hypothesis.example(NEVER_TOLD, TIGHT)
@hypothesis.settings(max_examples=max(FEW, hypothesis.settings.default.max_examples))
@given(TAPES, KINDS)
def test_every_schedule_ends_well(tape: list[int], kinds: tuple[dict[str, object], dict[str, object]]) -> None:
    prefill, decode = kinds
    play(Pair(config("prefill", **prefill), config("decode", **decode)), tape)


def test_phases_are_told_apart_by_the_clock() -> None:
    giver = Giver(HandoffConfig("prefill", num_writers=2))
    prompt, page = Prompt(8, 1), ints([1])

    def at(now: float, *events: Wire | Inner) -> list[Action]:
        return [action for event in (Clock(now), *events) for action in giver.apply(event)]

    at(1.0, Joined("p"), Opened(0, 7, prompt))
    at(3.0, Heard("p", Reserve(7, 0, 0, prompt, 0, page, -1)))
    at(6.0, Ticketed(0, 10, False, 4))
    at(10.0, Ticketed(0, 11, True, 4))
    at(15.0, Computed(0))
    at(16.0, Written(10, 0, 5, None, 0.5), Written(10, 1, 5, None, 0.25))
    (_, told) = at(21.0, Written(11, 0, 5, None, 2.0), Written(11, 1, 5, None, 1.0))
    assert isinstance(told, Tell)
    times = HandoverTimes(2.0, 3.0, 9.0, 6.0, None, 2.5, 20, 21.0)
    assert told.letter == Sent(0, prompt, times, None, 4)


def test_a_prompt_that_is_written_before_its_step_is_done_took_no_time_for_it() -> None:
    """Another DP rank computes still."""
    giver = Giver(HandoffConfig("prefill"))
    prompt, page = Prompt(8, 1), ints([1])
    events = [
        Joined("p"),
        Opened(0, 7, prompt),
        Heard("p", Reserve(7, 0, 0, prompt, 0, page, -1)),
        Ticketed(0, 1, True),
    ]
    for event in (Clock(1.0), *events, Clock(4.0)):
        giver.apply(event)
    (_, told) = giver.apply(Written(1, 0, 5))
    assert isinstance(told, Tell)
    assert isinstance(told.letter, Sent)
    assert told.letter.times == HandoverTimes(0.0, 0.0, 3.0, 0.0, num_bytes=5, ended=4.0)
    assert giver.apply(Computed(0)) == []
