"""The event log: the same events give the same steps again, to the bit; a log that does not is refused by line."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from plan.fake import World, request
from plan.test_traces import actions, configs, play
from tessera.core.errors import LogError
from tessera.core.messages import Abort, Flush, Stop
from tessera.plan.log import Applied, Began, Recorder, decode, encode, replay
from tessera.plan.scheduler import Planner, PlannerConfig
from tessera.plan.step import Clock, PartDone, StepDone, ints

CONFIG = PlannerConfig(2, 20, 4, 24, mixed=True, chunk_size=5, prefix_cache=True, max_in_flight=2)


class Recorded(World):
    """A world whose planner is driven through a recorder."""

    def __init__(self, config: PlannerConfig) -> None:
        self.lines: list[bytes] = []
        super().__init__(config, lambda planner: Recorder(planner, self.lines.append))


def recorded() -> Recorded:
    world = Recorded(CONFIG)
    world.submit(request("a", [1, 2, 3, 4, 5], 6, n=2, logit_bias={3: 1.5}, stop_token_ids=(4,)))
    world.turn()
    world.submit(request("b", [1, 2, 3, 4, 1, 1, 1], 9, priority=1))
    world.turn()
    world.abort("a", 1)
    world.finish()
    return world


@settings(max_examples=40, deadline=None)
@given(configs(), actions())
def test_a_log_replays_to_the_same_steps(config: PlannerConfig, acts: list[tuple]) -> None:
    world = Recorded(config)
    play(world, acts)
    again = [step for step in replay(world.lines, check=True) if step is not None]
    assert [encode(step) for step in again] == [encode(step) for step in world.steps]


def test_every_event_comes_back_as_it_was() -> None:
    done = StepDone(7, (PartDone(ints([2, 0]), np.array([[5], [6]], np.int32), np.array([True, False])),) * 2)
    nothing = StepDone(8, (PartDone(ints(), np.zeros((0, 1), np.int32), np.zeros(0, np.bool_)),))
    submit = request("r", [1, 2], 3, n=2, namespace="b", logit_bias={7: -1.0}, top_p=0.1 + 0.2)
    events = [submit, Abort("r", 1, "stop"), Flush(), Stop(2.5), Clock(0.1), done, nothing]
    line = encode(Applied(events))
    assert line.count(b"\n") == 1
    back = decode(line)
    assert isinstance(back, Applied)
    assert encode(back) == line
    assert back.events[:5] == events[:5]
    tokens = back.events[6].parts[0].tokens
    assert (tokens.shape, tokens.dtype) == ((0, 1), np.int32)


def test_a_step_that_differs_is_named_by_its_line() -> None:
    lines = recorded().lines
    at = next(i for i, line in enumerate(lines) if b'"n":2' in line)
    wrong = lines.copy()
    wrong[at] = lines[at].replace(b"[1,2,3,4,5]", b"[1,2,3,4,6]")
    with pytest.raises(LogError, match="but the same events give") as raised:
        list(replay(wrong))
    assert raised.value.line > at


@pytest.mark.parametrize(
    "line", [b"", b"{", b'{"type":"Applied"}', b'{"type":"Else"}', b"[1]", b'{"type":"Planned","index":"x"}']
)
def test_a_line_that_is_no_record_is_refused(line: bytes) -> None:
    with pytest.raises(LogError, match=r"^line 2 of the event log"):
        list(replay([encode(Began(CONFIG)), line]))


def test_a_log_without_its_beginning_is_refused() -> None:
    with pytest.raises(LogError, match="begins with the configuration"):
        list(replay(recorded().lines[1:]))


def test_a_log_of_a_bad_configuration_is_refused() -> None:
    line = encode(Began(CONFIG)).replace(b'"max_running":2', b'"max_running":0')
    with pytest.raises(LogError, match="max_running 0"):
        list(replay([line]))


def test_what_a_planner_fails_on_is_the_last_line() -> None:
    lines: list[bytes] = []
    recorder = Recorder(Planner(CONFIG), lines.append)
    recorder.apply([Clock(2.0)])
    with pytest.raises(AssertionError):
        recorder.apply([Clock(1.0)])
    assert msgspec.json.decode(lines[-1])["events"] == [{"type": "Clock", "now": 1.0}]
