"""Whatever goes wrong, everybody who waits is told once, the loop ends, and nothing is left running."""

from __future__ import annotations

import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.core.errors import ConfigError, PeerError
from tessera.core.messages import Abort, Fatal, Outbound, Output, Outputs, Ready, SamplingParams, Stop, Submit, Tick
from tessera.plan.log import encode, replay
from tessera.plan.step import Step
from tessera.run import loop as loop_module
from tessera.run.core import EngineCore
from tiny import all_free, resolved, tiny_model

MODEL = tiny_model("hybrid")
LONG = SamplingParams(temperature=0.0, max_new_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_new_tokens=4, ignore_eos=True)
WAIT_S = 60.0  # on a device the first step compiles kernels


class Engine:
    """A core in a thread, and all that it said."""

    def __init__(self, react: Callable[[Engine, Outbound], None] = lambda engine, message: None, **flags: Any) -> None:
        self.said: list[Outbound] = []
        self.raised: BaseException | None = None
        self._react = react
        self.core = self._make(**flags)
        self.thread = threading.Thread(target=self._run, name="core")

    def _make(self, **flags: Any) -> EngineCore:
        return EngineCore(resolved(MODEL.spec, **flags), MODEL.spec, MODEL.source, self._sink)

    def _sink(self, message: Outbound) -> None:
        self.said.append(message)
        self._react(self, message)

    def _run(self) -> None:
        try:
            self.core.run()
        except BaseException as error:
            self.raised = error

    def __enter__(self) -> Engine:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.core.post(Stop())
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()

    def ended(self) -> dict[tuple[str, int], Output]:
        """The last output of every choice, once the loop has ended; nothing came after it, and none came twice."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        outputs = [output for message in self.said if isinstance(message, Outputs) for output in message.items]
        assert set(Counter((o.request_id, o.choice) for o in outputs if o.finish is not None).values()) <= {1}
        last = {(o.request_id, o.choice): o for o in outputs}
        assert all(o.finish is not None for o in last.values())
        return last

    def fatal(self) -> Fatal | None:
        """How it failed; a `Fatal` is the last message."""
        last = self.said[-1]
        return last if isinstance(last, Fatal) else None


def prompt(i: int) -> list[int]:
    return [2 + (i * 7 + k) % 90 for k in range(5 + i)]


def third(broken: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Works twice, then raises."""
    calls = iter(range(3))

    def call(*args: Any) -> Any:
        if next(calls) == 2:
            raise error
        return broken(*args)

    return call


BREAKS: dict[str, tuple[Callable[[EngineCore], Any], str]] = {
    "the forward": (lambda core: core.runner.model, "forward"),
    "drawing": (lambda core: type(core.runner.sampler), "draw"),
    "launch": (lambda core: core.runner, "launch"),
    "collect": (lambda core: core.runner, "collect"),
    "the planner": (lambda core: core.planner, "next_step"),
    "a report": (lambda core: core._loop, "report"),
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("place", BREAKS)
def test_a_failure_anywhere_is_told_to_all_and_ends_the_loop(
    place: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(disable_overlap_schedule=not overlap)
    find, name = BREAKS[place]
    owner = find(engine.core)
    monkeypatch.setattr(owner, name, third(getattr(owner, name), ValueError("out of cheese")))
    asked = [Submit(f"r{i}", prompt(i), LONG, n=1 + i % 2) for i in range(20)]
    for submit in asked:
        engine.core.post(submit)
    with engine:
        last = engine.ended()
        assert set(last) == {(s.request_id, c) for s in asked for c in range(s.n)}
        for output in last.values():
            assert (output.finish, output.fault) == ("error", "engine")
            assert "ValueError: out of cheese" in (output.error or "")
        assert engine.fatal() == Fatal("ValueError: out of cheese", "ValueError")
        engine.core.post(Submit("late", [2, 3], SHORT))
        late = engine.said[-1]
        assert isinstance(late, Outputs)
        assert "out of cheese" in (late.items[0].error or "")
    assert engine.raised is None


@pytest.mark.parametrize("error", [PeerError("rank 1 was ended by SIGKILL"), ValueError("out of cheese")])
def test_what_may_be_expected_is_one_line_and_a_fault_of_ours_one_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    monkeypatch.setattr(engine.core.runner, "launch", third(engine.core.runner.launch, error))
    for i in range(6):
        engine.core.post(Submit(f"r{i}", prompt(i), LONG))
    with engine:
        assert len(engine.ended()) == 6
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert caplog.text.count(str(error)) == 1
    assert (record.exc_info is not None, "Traceback" in caplog.text) == (isinstance(error, ValueError),) * 2


def test_an_interrupt_in_the_loop_is_told_and_goes_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    monkeypatch.setattr(engine.core.runner, "launch", third(engine.core.runner.launch, KeyboardInterrupt()))
    engine.core.post(Submit("r", prompt(1), LONG))
    with engine:
        assert engine.ended()["r", 0].fault == "engine"
    assert isinstance(engine.raised, KeyboardInterrupt)


def test_a_failed_check_ends_the_loop() -> None:
    def lose(engine: Engine, message: Outbound) -> None:
        if isinstance(message, Outputs):
            engine.core.planner.ranks[0].state.pages.refs[1] += 1

    engine = Engine(lose, debug_checks=True)
    engine.core.post(Submit("r", prompt(1), LONG))
    with engine:
        assert engine.ended()["r", 0].finish == "error"
        assert (engine.fatal() or Fatal("")).kind == "AssertionError"
    unchecked = Engine(lambda engine, message: None)
    assert unchecked.core.runner._watch is not None, "tests check everything"
    plain = Engine(debug_checks=False)
    assert plain.core.runner._watch is None
    assert plain.core._loop._hook is None
    for made in (unchecked, plain):
        made.core.post(Stop())
        made.core.run()


@pytest.mark.parametrize("deadline", [0.0, 30.0])
def test_stop_while_busy_ends_what_runs_by_its_deadline(deadline: float) -> None:
    def stop(engine: Engine, message: Outbound) -> None:
        if isinstance(message, Outputs) and not engine.core.planner.stopping:
            engine.core.post(Stop(deadline))
            engine.core.post(Submit("late", [2, 3], SHORT))

    engine = Engine(stop, max_running_requests=4)
    for i in range(8):
        engine.core.post(Submit(f"r{i}", prompt(i), SHORT))
    with engine:
        last = engine.ended()
    late = last.pop(("late", 0))
    assert (late.finish, "stopping" in (late.error or "")) == ("error", True)
    reasons = {output.finish for output in last.values()}
    assert len(last) == 8
    assert reasons == ({"length"} if deadline else {"abort"})
    assert engine.fatal() is None
    assert all_free(engine.core)


def test_a_deadline_passes_while_requests_run() -> None:
    engine = Engine()
    engine.core.post(Submit("r", prompt(1), LONG))
    with engine:
        while not any(isinstance(message, Outputs) for message in engine.said):
            time.sleep(0.001)
        engine.core.post(Stop(0.05))
        assert engine.ended()["r", 0].finish == "abort"
    assert all_free(engine.core)


def test_an_abort_reaches_every_choice_wherever_it_is() -> None:
    engine = Engine(max_running_requests=3)
    asked = [Submit(f"r{i}", prompt(i), LONG, n=3) for i in range(5)]
    for submit in asked:
        engine.core.post(submit)
    with engine:
        while not any(isinstance(message, Outputs) for message in engine.said):
            time.sleep(0.001)
        for submit in asked:
            engine.core.post(Abort(submit.request_id))
        engine.core.post(Submit("after", prompt(3), SHORT))
        engine.core.post(Stop(30.0))
        last = engine.ended()
    assert last.pop(("after", 0)).finish == "length"
    assert Counter(output.finish for output in last.values()) == {"abort": 15}
    assert all_free(engine.core)


def test_a_second_request_of_the_same_id_does_not_end_the_first() -> None:
    def again(engine: Engine, message: Outbound) -> None:
        if sum(isinstance(m, Outputs) for m in engine.said) == 1 and isinstance(message, Outputs):
            engine.core.post(Submit("r", prompt(1), SHORT))
            engine.core.post(Stop(30.0))

    engine = Engine(again)
    engine.core.post(Submit("r", prompt(1), SHORT))
    engine.core.run()
    outputs = [o for message in engine.said if isinstance(message, Outputs) for o in message.items]
    assert [o.fault for o in outputs if o.finish == "error"] == ["request"]
    assert sum(len(o.tokens) for o in outputs) == 4
    assert all_free(engine.core)


def test_the_event_log_replays_to_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "events"
    engine = Engine(log_events=str(path), max_total_tokens=96, enable_mixed_chunk=True, chunked_prefill_size=9)
    launched: list[Step] = []
    launch = engine.core.runner.launch
    engine.core.runner.launch = lambda step: (launched.append(step), launch(step))[1]  # type: ignore[method-assign]
    for i in range(9):
        engine.core.post(Submit(f"r{i}", prompt(4 * i), SHORT, n=1 + i % 3))
    engine.core.post(Abort("r5"))
    engine.core.post(Stop(30.0))
    engine.core.run()
    again = [step for step in replay(path.read_bytes().splitlines(), check=True) if step is not None]
    assert [encode(step) for step in again] == [encode(step) for step in launched]
    assert len(again) > 10


@pytest.mark.parametrize("path", ["", "/dev/full"])
def test_an_event_log_that_cannot_be_written_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--log-events"):
        Engine(log_events=str(tmp_path / path))


def test_a_full_disk_ends_the_event_log_and_not_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Known fault: every request failed. What was written ends with a whole line, so it replays."""
    path, (soft, hard) = tmp_path / "events", resource.getrlimit(resource.RLIMIT_FSIZE)
    engine = Engine(log_events=str(path))
    engine.core.post(Submit("r", prompt(1), SHORT))
    engine.core.post(Submit("again", prompt(2), LONG))
    engine.core.post(Stop(30.0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a file that grows beyond it is told so, as by a full disk
    try:
        engine.core.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ends = [o for message in engine.said if isinstance(message, Outputs) for o in message.items if o.finish is not None]
    assert {(o.request_id, o.finish) for o in ends} == {("r", "length"), ("again", "length")}
    assert [m.split(": ")[0] for m in caplog.messages if "it ends here" in m] == [f"--log-events {path}"]
    assert 1000 < path.stat().st_size <= 2000
    assert len([step for step in replay(path.read_bytes().splitlines()) if step is not None]) > 1


def test_many_threads_may_post() -> None:
    with Engine() as engine:

        def post(k: int) -> None:
            for i in range(10):
                engine.core.post(Submit(f"{k}-{i}", prompt(i), SHORT))
                if i % 3 == 2:
                    engine.core.post(Abort(f"{k}-{i}"))

        threads = [threading.Thread(target=post, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        engine.core.post(Stop(60.0))
        last = engine.ended()
    assert len(last) == 80
    assert {output.finish for output in last.values()} <= {"length", "abort"}
    assert all_free(engine.core)


def test_an_idle_loop_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "IDLE_WAIT_S", 0.01)
    with Engine() as engine:
        deadline = time.monotonic() + WAIT_S
        while sum(isinstance(message, Tick) for message in engine.said) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert isinstance(engine.said[0], Ready)
        assert time.monotonic() - engine.core.last_tick < WAIT_S
        assert sum(isinstance(message, Tick) for message in engine.said) >= 3


def test_a_core_that_never_ran_refuses_nothing_and_one_that_ended_refuses_all() -> None:
    engine = Engine()
    engine.core.post(Submit("early", prompt(2), SHORT))
    engine.core.post(Stop(30.0))
    engine.core.run()
    assert engine.said[0] == Ready(engine.core.info())
    engine.core.post(Submit("late", prompt(2), SHORT, n=2))
    engine.core.post(Abort("late"))
    outputs = [o for message in engine.said if isinstance(message, Outputs) for o in message.items if o.finish]
    assert [(o.request_id, o.choice, o.finish) for o in outputs] == [
        ("early", 0, "length"),
        ("late", 0, "error"),
        ("late", 1, "error"),
    ]
