"""Promise: where pages or slots are few, as many rows run as they hold, and little is computed twice."""

from __future__ import annotations

import pytest
from tests.bench.scripts import script

planner = script("planner")
scarce = planner.scarce
REQUESTS, PROMPT, NEW = 128, 256, 64
WHOLE = -(-(PROMPT + NEW) // planner.PAGE_SIZE)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("held", [16, 90])
def test_few_pages_do_not_thrash(held: int, mixed: bool) -> None:
    """Pages for `held` requests at their full length."""
    found = scarce(REQUESTS, 1 + held * WHOLE, 0, PROMPT, NEW, mixed)
    assert 0 < found.preempted < REQUESTS / 2
    assert found.again < 0.11, "without a page to spare for each row it is 0.13"
    waves = -(-REQUESTS // held)
    assert found.steps < 1.15 * NEW * waves + 2 * REQUESTS * PROMPT / 8192 * (1 + found.again)


@pytest.mark.parametrize("mixed", [False, True])
def test_few_slots_cost_nothing_but_time(mixed: bool) -> None:
    found = scarce(REQUESTS, 1 + REQUESTS * WHOLE, 17, PROMPT, NEW, mixed)
    assert (found.preempted, found.again) == (0, 0)
    assert found.steps < 1.1 * NEW * REQUESTS / 16 + 2 * REQUESTS / 16


def test_where_all_is_there_everything_runs_at_once() -> None:
    found = scarce(REQUESTS, 1 + REQUESTS * WHOLE, 0, PROMPT, NEW)
    assert (found.preempted, found.again) == (0, 0)
    assert found.steps <= NEW + 2 * REQUESTS * PROMPT // 8192 + 2
