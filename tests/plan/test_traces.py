"""Promises 1 and 3: random traces give the answers of a direct computation, and nothing leaks, whatever the setting."""

from __future__ import annotations

import os

import hypothesis.strategies as st
from hypothesis import given, settings

from plan.fake import World, request
from tessera.plan.balance import BALANCES
from tessera.plan.scheduler import PlannerConfig

EXAMPLES = int(os.environ.get("TESSERA_TEST_EXAMPLES", "150"))


@st.composite
def configs(draw: st.DrawFn) -> PlannerConfig:
    page_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    recurrent = draw(st.booleans())
    rows = draw(st.integers(1, 6))
    return PlannerConfig(
        max_running=rows,
        num_pages=draw(st.integers(4, 24)) if draw(st.booleans()) else 200,
        page_size=page_size,
        max_context=draw(st.sampled_from([12, 24, 40])),
        num_slots=draw(st.integers(2, rows + 2)) if recurrent else 0,
        num_dp=draw(st.sampled_from([1, 1, 2, 3, 4])),
        chunk_size=draw(st.sampled_from([0, 1, 2, 3, 5, 8, 64])),
        alone_size=draw(st.sampled_from([0, 0, 4, 12])),
        max_prefill_tokens=draw(st.sampled_from([0, 0, 4, 16])),
        mixed=draw(st.booleans()),
        max_in_flight=draw(st.sampled_from([1, 2, 2, 3])),
        prefix_cache=not recurrent and draw(st.booleans()),
        policy=draw(st.sampled_from(["fcfs", "lpm", "priority"])),
        load_balance=draw(st.sampled_from(sorted(BALANCES))),
        max_queued=draw(st.sampled_from([0, 0, 3])),
        split_from=draw(st.sampled_from([0, 1, 6])),
        split_grain=draw(st.sampled_from([1, 3])),
    )


# few different tokens and shared stems, so that prefixes meet
STEMS = [[1, 2, 3, 4, 5, 1, 2, 3, 4], [1, 2, 3, 4, 2, 2], [3]]


@st.composite
def actions(draw: st.DrawFn) -> list[tuple]:
    acts: list[tuple] = []
    for i in range(draw(st.integers(1, 10))):
        tokens = draw(st.sampled_from(STEMS)) + draw(st.lists(st.integers(1, 3), max_size=8))
        acts.append(
            (
                "submit",
                request(
                    f"r{i}",
                    tokens,
                    draw(st.sampled_from([0, 1, 2, 5, 12, 30])),
                    seed=draw(st.integers(0, 3)),
                    ignore_eos=draw(st.booleans()),
                    prompt_logprobs=draw(st.sampled_from([-1, -1, 0])),
                    logprob_start=draw(st.integers(0, 6)),
                    n=draw(st.sampled_from([1, 1, 1, 2, 4])),
                    priority=draw(st.integers(0, 2)),
                    namespace=draw(st.sampled_from(["", "", "b"])),
                    dp_rank=draw(st.sampled_from([None, None, 0, 1, 3])),
                    bootstrap_room=draw(st.sampled_from([None, 5, 1 << 62])),
                ),
            )
        )
        acts += [("turn",)] * draw(st.integers(0, 4))
        if draw(st.integers(0, 3)) == 0:
            acts.append(("abort", f"r{draw(st.integers(0, i))}", draw(st.sampled_from([None, 0, 1]))))
            acts += [(draw(st.sampled_from(["launch", "turn"])),)]
        if draw(st.integers(0, 7)) == 0:
            acts.append(("flush",))
        if draw(st.integers(0, 9)) == 0:
            acts.append(("tick", draw(st.sampled_from([0.5, 2.0]))))
        if draw(st.integers(0, 19)) == 0:
            acts.append(("stop", draw(st.sampled_from([0.0, 1.0, 9.0]))))
    return acts


def play(world: World, acts: list[tuple]) -> None:
    """Runs a trace to its end."""
    for act in acts:
        match act:
            case ("submit", submit):
                world.submit(submit)
            case ("turn",):
                world.turn()
            case ("launch",):
                world.launch()
            case ("abort", request_id, choice):
                submit = world.submitted[request_id]
                wanted = [(request_id, c) for c in range(submit.n) if choice in (None, c)]
                if not all(key in world.ends for key in wanted):
                    world.abort(request_id, choice)
            case ("flush",):
                world.flush()
            case ("tick", seconds):
                world.tick(seconds)
            case ("stop", deadline_s):
                world.stop(deadline_s)
    world.finish()


@settings(max_examples=EXAMPLES, deadline=None)
@given(configs(), actions())
def test_any_trace_gives_the_direct_answer_and_leaks_nothing(config: PlannerConfig, acts: list[tuple]) -> None:
    play(World(config), acts)
