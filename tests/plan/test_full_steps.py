"""Promise: a load of prompts and answers takes no more steps than its tokens need: steps that hold prompts are full, on
all ranks. Seed 1's line (issue 3) without ranks: 200 requests of 512 in, 128 out; two DP ranks, chunks of 256."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from tessera.core.messages import SamplingParams, Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.scheduler import Planner
from tessera.plan.step import Part, PartDone, Step, StepDone

REQUESTS, PROMPT, NEW, CHUNK, ROWS = 200, 512, 128, 256, 64


def done(part: Part) -> PartDone:
    """What a rank says of a part whose answers end by their length."""
    drawn, ends = part.rows[part.samples], (part.starts + part.lengths)[part.samples]
    return PartDone(drawn, np.ones((len(drawn), 1), np.int32), ends + 1 >= PROMPT + NEW)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_steps_with_prompts_are_full_on_every_rank(in_flight: int) -> None:
    config = PlannerConfig(
        ROWS, 1 + ROWS * 40, 16, 2048, num_dp=2, chunk_size=CHUNK, mixed=True, max_in_flight=in_flight
    )
    planner, flying, steps = Planner(config), deque[Step](), []
    planner.apply([Submit(str(i), [1] * PROMPT, SamplingParams(max_new_tokens=NEW)) for i in range(REQUESTS)])
    while not planner.idle:
        while (step := planner.next_step()) is not None:
            flying.append(step)
        step = flying.popleft()
        steps.append(step)
        planner.apply([StepDone(step.index, tuple(map(done, step.parts)))])
    with_prompts = [step for step in steps if any((part.lengths > 1).any() for part in step.parts)]
    tokens = [[part.num_tokens for part in step.parts] for step in with_prompts]
    assert tokens[:-1] == [[CHUNK, CHUNK]] * (len(tokens) - 1)
    assert len(steps) - len(with_prompts) == NEW - 1, "the answer to the last prompt, and nothing besides"
    left = sum(part.num_tokens for step in steps[len(with_prompts) :] for part in step.parts)
    assert len(with_prompts) == -(-(REQUESTS * (PROMPT + NEW - 1) - left) // (2 * CHUNK))
