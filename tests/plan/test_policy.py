"""Who goes first, who is put back, and which rank takes a request."""

from __future__ import annotations

import pytest

from plan.fake import World, request
from tessera.core.messages import Submit
from tessera.plan.balance import BALANCES, FOLLOW
from tessera.plan.policy import MOST_REORDERED
from tessera.plan.scheduler import PlannerConfig


def entered(world: World, dp_rank: int = 0) -> list[str]:
    """Requests in the order in which they first had a row."""
    names = [enter.request_id for step in world.steps for enter in step.parts[dp_rank].change.enter]
    return list(dict.fromkeys(names))


def one_row(policy: str, prompts: dict[str, list[int]], priorities: dict[str, int] | None = None) -> list[str]:
    """Order in which requests have the only row, when all wait for one that holds it."""
    world = World(PlannerConfig(1, 60, 2, 30, policy=policy, prefix_cache=True))
    world.submit(request("holds", [1, 2, 3, 4, 5, 1], 3, ignore_eos=True))
    world.turn()
    for name, tokens in prompts.items():
        world.submit(request(name, tokens, 1, priority=(priorities or {}).get(name, 0)))
    world.finish()
    return entered(world)[1:]


PROMPTS = {"none": [3, 3, 3], "some": [1, 2, 3, 4, 4, 4], "most": [1, 2, 3, 4, 5, 1, 2], "also none": [5]}


def test_first_come_is_first_served() -> None:
    assert one_row("fcfs", PROMPTS) == list(PROMPTS)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "lpm"])
def test_a_higher_priority_goes_first(policy: str) -> None:
    found = one_row(policy, PROMPTS, {"also none": 2, "none": -1})
    assert (found[0], found[-1]) == ("also none", "none")


def test_the_longest_cached_prefix_goes_first_and_the_rest_in_order() -> None:
    assert one_row("lpm", PROMPTS) == ["most", "some", "none", "also none"]


def test_a_long_queue_keeps_its_order() -> None:
    many = {f"r{i}": [1, 2, 3, 4] if i % 2 else [2] for i in range(MOST_REORDERED + 2)}
    assert one_row("lpm", many)[0] == "r0"


@pytest.mark.parametrize(("priorities", "victim"), [((0, 0), "second"), ((0, 1), "first"), ((1, 0), "second")])
def test_who_stands_last_is_put_back(priorities: tuple[int, int], victim: str) -> None:
    world = World(PlannerConfig(2, 8, 2, 24, max_in_flight=2))
    for name, priority in zip(("first", "second"), priorities, strict=True):
        world.submit(request(name, [1, 2, 3], 8, ignore_eos=True, priority=priority))
    world.finish()
    again = [enter.request_id for step in world.steps for enter in step.parts[0].change.enter]
    assert {name for name in again if again.count(name) > 1} == {victim}


def test_what_was_put_back_goes_before_those_that_never_ran() -> None:
    world = World(PlannerConfig(2, 8, 2, 24, policy="lpm", prefix_cache=True))
    world.submit(request("first", [1, 2, 3], 8, ignore_eos=True))
    world.submit(request("second", [3, 2, 1], 8, ignore_eos=True))
    world.turn()
    world.submit(request("late", [1, 2, 3], 8, ignore_eos=True))
    world.finish()
    assert world.planner.ranks[0].state.num_preempted > 0
    last = [enter.request_id for step in world.steps for enter in step.parts[0].change.enter]
    assert last.index("late") > max(i for i, name in enumerate(last) if name == "second")


def spread(balance: str, sizes: list[int], num_dp: int = 3) -> list[int]:
    """Rank that takes each of some requests, none of which has ended."""
    world = World(PlannerConfig(8, 100, 4, 60, num_dp=num_dp, load_balance=balance))
    for i, size in enumerate(sizes):
        world.submit(request(f"r{i}", [1, 2], size, ignore_eos=True))
    world.launch()
    ranks = {e.request_id: rank for rank, part in enumerate(world.steps[0].parts) for e in part.change.enter}
    return [ranks[f"r{i}"] for i in range(len(sizes))]


def test_requests_go_round() -> None:
    assert spread("round_robin", [50, 1, 1, 1, 1]) == [0, 1, 2, 0, 1]


def test_requests_go_where_few_tokens_are_owed() -> None:
    assert spread("total_tokens", [50, 20, 12, 12, 1]) == [0, 1, 2, 2, 1]


def test_requests_go_where_few_are() -> None:
    world = World(PlannerConfig(8, 100, 4, 60, num_dp=2, load_balance="total_requests"))
    world.submit(request("long", [1, 2], 20, ignore_eos=True))
    world.submit(request("short", [1, 2], 1))
    while ("short", 0) not in world.ends:
        world.turn()
    for name in ("third", "fourth"):
        world.submit(request(name, [1, 2], 20, ignore_eos=True))
    world.finish()
    assert [entered(world, rank) for rank in (0, 1)] == [["long", "fourth"], ["short", "third"]]


@pytest.mark.parametrize("balance", sorted(BALANCES))
def test_the_rank_that_a_request_names_takes_it_whatever_the_method(balance: str) -> None:
    world = World(PlannerConfig(8, 100, 4, 60, num_dp=3, load_balance=balance))
    for i, rank in enumerate([2, 2, 0, 2, 1]):
        world.submit(request(f"r{i}", [1, 2], 4, dp_rank=rank, bootstrap_room=1))
    world.finish()
    assert [entered(world, rank) for rank in range(3)] == [["r2"], ["r4"], ["r0", "r1", "r3"]]


def test_a_request_follows_its_room() -> None:
    world = World(PlannerConfig(8, 100, 4, 60, num_dp=3, load_balance=FOLLOW))
    rooms = [7, 3, (1 << 62) + 1, 8]
    for i, room in enumerate(rooms):
        world.submit(request(f"r{i}", [1, 2], 4, bootstrap_room=room))
    world.finish()
    assert [entered(world, rank) for rank in range(3)] == [
        [f"r{i}" for i, room in enumerate(rooms) if room % 3 == rank] for rank in range(3)
    ]


MISPLACED = {
    "data-parallel rank 2 is asked for; there are 0 to 1": request("r", [1], 1, dp_rank=2),
    "no bootstrap_room to follow": request("r", [1], 1),
}


@pytest.mark.parametrize("why", MISPLACED)
def test_what_has_no_place_is_refused_and_needs_one_only_among_several(why: str) -> None:
    for num_dp in (2, 1):
        world = World(PlannerConfig(2, 5, 4, 24, num_dp=num_dp, load_balance=FOLLOW))
        outputs = world.planner.apply([MISPLACED[why]])
        assert [out.fault for out in outputs] == (["request"] if num_dp == 2 or "rank 2" in why else [])
        assert all(why.replace("0 to 1", f"0 to {num_dp - 1}") in str(out.error) for out in outputs)


BAD = {
    "at most 23 are allowed": request("r", [1] * 24, 1),
    "needs 5 pages of 4 tokens; the pool has 4": request("r", [1] * 4, 17),
    "the prompt has 0 tokens": request("r", [], 1),
    "'used' is in use": request("used", [1], 1),
}


@pytest.mark.parametrize("why", BAD)
def test_what_can_never_be_served_is_refused_by_reason(why: str) -> None:
    world = World(PlannerConfig(2, 5, 4, 24))
    world.submit(request("used", [1, 2], 4))
    bad: Submit = BAD[why]
    outputs = world.planner.apply([bad])
    assert [out.fault for out in outputs] == ["request"]
    assert why in str(outputs[0].error)
    world.finish()


def test_a_full_queue_refuses_for_now() -> None:
    world = World(PlannerConfig(1, 20, 4, 24, max_queued=2))
    for i in range(4):
        world.submit(request(f"r{i}", [1], 3))
    world.finish()
    faults = [world.ends[f"r{i}", 0].fault for i in range(4)]
    assert faults == [None, None, "busy", "busy"]
