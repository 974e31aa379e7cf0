"""Promise: a dry step is one that the planner could plan, of any size, and leaves no state behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tessera.core.messages import SamplingParams, Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.dry import dry_step, largest
from tessera.plan.scheduler import Planner


@st.composite
def configs(draw: st.DrawFn) -> PlannerConfig:
    sizes = st.sampled_from([0, 1, 7, 64, 4096])
    return PlannerConfig(
        max_running=draw(st.integers(1, 70)),
        num_pages=draw(st.integers(2, 500)),
        page_size=draw(st.sampled_from([1, 16])),
        max_context=draw(st.integers(2, 5000)),
        num_dp=draw(st.integers(1, 3)),
        chunk_size=draw(sizes),
        alone_size=draw(sizes),
        max_prefill_tokens=draw(sizes),
        split_grain=draw(st.sampled_from([1, 64])),
    )


@given(configs(), st.integers(1, 4000), st.booleans())
def test_every_size_is_a_step_that_rows_hold(config: PlannerConfig, num_tokens: int, halves: bool) -> None:
    num_tokens = min(num_tokens, config.max_running * config.max_context)
    step = dry_step(config, num_tokens, halves)
    assert len(step.parts) == config.num_dp
    for part in step.parts:
        assert part.num_tokens == num_tokens
        assert part.change.empty
        assert (part.lengths > 0).all()
        assert (part.starts + part.lengths <= config.max_context).all()
        assert len(set(part.rows.tolist())) == len(part.rows)
        assert set(part.rows.tolist()) <= set(range(config.max_running))
        assert (np.diff(part.lengths) <= 0).all(), "longer ranges come first"
    assert len(step.cuts) == (config.num_dp if halves else 0)
    if halves and min(len(part.rows) for part in step.parts) > 1:
        assert all(half.num_tokens for half in step.halves), "there is something to try"


def submit(number: int, length: int) -> Submit:
    return Submit(f"r{number}", [3] * length, SamplingParams(max_new_tokens=1, temperature=0.0))


@given(configs(), st.integers(1, 5000))
def test_no_step_is_larger_than_the_largest(config: PlannerConfig, length: int) -> None:
    assume(config.chunk_size > 0 or config.max_prefill_tokens > 0)
    planner = Planner(config)
    planner.apply([submit(i, length) for i in range(config.max_running * config.num_dp)])
    step = planner.next_step()
    assert step is None or max(part.num_tokens for part in step.parts) <= largest(config)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"chunk_size": 512}, 512),
        ({"chunk_size": 512, "alone_size": 2048}, 2048),
        ({"chunk_size": 512, "max_prefill_tokens": 300}, 300),
        ({"max_prefill_tokens": 3000}, 3000),
        ({"max_context": 3000, "max_prefill_tokens": 100}, 3000),
        ({"chunk_size": 4, "max_running": 64}, 64),
        ({"chunk_size": 512, "num_pages": 11}, 160),
        ({"chunk_size": 512, "max_running": 1, "max_context": 100}, 100),
    ],
)
def test_the_largest_step_comes(changed: dict[str, int], expected: int) -> None:
    config = PlannerConfig(**{"max_running": 8, "num_pages": 1000, "page_size": 16, "max_context": 1000} | changed)
    assert largest(config) == expected
