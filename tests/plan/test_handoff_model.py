"""Promise: whatever the network and the other side do, a hand-over ends in bounded time, with the right answer or a
clear error, and every page and slot is free again."""

from __future__ import annotations

import random

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from plan.pair import Pair, config, play
from tessera.plan.log import replay

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


@hypothesis.settings(max_examples=max(FEW, hypothesis.settings.default.max_examples))
@given(TAPES, KINDS)
def test_every_schedule_ends_well(tape: list[int], kinds: tuple[dict[str, object], dict[str, object]]) -> None:
    prefill, decode = kinds
    play(Pair(config("prefill", **prefill), config("decode", **decode)), tape)
