"""What goes over the wire to the ranks and back arrives as it was, to the bit and to the type."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plan import scenarios
from plan.fake import World
from tessera.core.errors import Conflict
from tessera.core.messages import Output, SamplingParams, TokenLogprobs
from tessera.plan.log import encode as as_text
from tessera.plan.step import Change, Enter, Part, PartDone, Step, StepDone
from tessera.run.graphs import Size
from tessera.run.report import Tally
from tessera.run.wire import (
    Begin,
    Done,
    Drop,
    End,
    Failed,
    Hello,
    Kept,
    Loaded,
    Loading,
    Record,
    Run,
    decode_down,
    decode_up,
    encode,
)
from tiny import resolved, tiny_model

WORLDS = ("shared_prefix", "crowded", "riding", "spread", "forked", "halved")
NUMBERS = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(allow_nan=False)


def ints(*shape: int) -> st.SearchStrategy[Any]:
    return arrays(np.int32, shape, elements=NUMBERS)


def flags(length: int) -> st.SearchStrategy[Any]:
    return arrays(np.bool_, length)


PARAMS = st.builds(
    SamplingParams,
    temperature=FLOATS,
    logit_bias=st.dictionaries(st.integers(0, 1 << 20), FLOATS, max_size=3),
    seed=st.integers(0, (1 << 63) - 1),
    stop_token_ids=st.lists(st.integers(0, 1 << 20), max_size=3).map(tuple),
)


@st.composite
def enters(draw: st.DrawFn) -> Enter:
    tokens, pages = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    row, slot, seed = draw(NUMBERS), draw(NUMBERS), draw(st.integers(0, (1 << 63) - 1))
    request = draw(st.text(max_size=5))
    return Enter(row, request, 1, draw(ints(tokens)), tokens, 0, draw(ints(pages)), slot, draw(PARAMS), seed, 2)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    n = draw(st.integers(0, 3))
    entering = tuple(draw(st.lists(enters(), max_size=2)))
    return Change(draw(ints(n)), entering, draw(ints(n, 3)), draw(ints(n, 2)), draw(ints(n, 2)), draw(ints(n)))


@st.composite
def parts(draw: st.DrawFn) -> Part:
    n = draw(st.integers(0, 4))
    return Part(*(draw(ints(n)) for _ in range(4)), draw(flags(n)), draw(changes()))


STEPS = st.builds(
    Step,
    st.integers(0, 1 << 40),
    st.lists(parts(), min_size=1, max_size=3).map(tuple),
    st.lists(st.integers(0, 9), max_size=2).map(tuple),
)


@st.composite
def dones(draw: st.DrawFn) -> Done:
    n = draw(st.integers(0, 4))
    part = PartDone(draw(ints(n)), draw(ints(n, draw(st.integers(1, 3)))), draw(flags(n)))
    entry = TokenLogprobs(draw(st.none() | st.floats(allow_nan=False)), [1, 2], [-0.5, float("-inf")], [draw(FLOATS)])
    output = Output(draw(st.text(max_size=4)), 1, [5], [entry], [TokenLogprobs(None), entry], "stop", 7, 3, 2)
    return Done(StepDone(9, (part,)), [output], [Tally("MIXED", 1, 2, 3)])


@settings(max_examples=40)
@given(STEPS)
def test_any_step_arrives_as_it_was_and_may_be_written_as_torch_wants_it(step: Step) -> None:
    came = decode_down(encode(Run(step)))
    assert isinstance(came, Run)
    assert as_text(came.step) == as_text(step)
    assert all(array.flags.writeable for part in came.step.parts for array in (part.rows, part.change.pages))


@pytest.mark.parametrize("name", WORLDS)
def test_steps_of_the_planner_arrive_as_they_were(name: str) -> None:
    world: World = getattr(scenarios, name)()
    assert world.steps
    for step in world.steps:
        came = decode_down(encode(Run(step)))
        assert isinstance(came, Run)
        assert as_text(came.step) == as_text(step)


@settings(max_examples=40)
@given(dones())
def test_any_result_arrives_as_it_was(done: Done) -> None:
    came = decode_up(encode(done))
    assert isinstance(came, Done)
    assert as_text(came.done) == as_text(done.done)
    assert came.outputs == done.outputs
    assert came.tallies == done.tallies


def test_the_other_messages_arrive_as_they_were() -> None:
    config = resolved(tiny_model("hybrid").spec, tp=4, dp=2, enable_dp_attention=True).config
    for down in (Begin(config, "a:1"), Record(Size(4, 64), "meet"), Drop("r", 1), End()):
        assert decode_down(encode(down)) == down
    refused = Failed("ConfigError", "no", (Conflict(("--a", "--b"), "why", "what"),))
    for up in (Hello(), Loading(1, 2), Loaded(), Kept(), refused):
        assert decode_up(encode(up)) == up


def test_what_is_no_message_is_refused() -> None:
    for data in (b"", b"\xc0", msgspec.msgpack.encode({"type": "Step"})):
        with pytest.raises(msgspec.DecodeError):
            decode_down(data)
    with pytest.raises(TypeError, match="cannot hold a object"):
        encode(Drop(object(), 0))  # type: ignore[arg-type]
