"""A profile is one trace for each process that computes, of the steps that were asked for; what cannot be is told."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from run.test_loop import SHORT, Engine, prompt
from tessera.core.messages import EndProfile, Outbound, Outputs, Profile, Profiled, StepReport, Submit
from tessera.run import profiling

WAIT_S = 60.0


class Asking:
    """An engine, and what it answers."""

    def __init__(self, **flags: Any) -> None:
        self.answers: dict[str, Profiled] = {}
        self.steps: list[int] = []
        self.done: set[str] = set()
        self._changed = threading.Condition()
        self.engine = Engine(self._take, **flags)
        self.engine.thread.start()

    def _take(self, engine: Engine, message: Outbound) -> None:
        with self._changed:
            if isinstance(message, Profiled):
                self.answers[message.id] = message
            elif isinstance(message, StepReport) and message.seconds:
                self.steps.append(message.index)
            elif isinstance(message, Outputs):
                self.done |= {output.request_id for output in message.items if output.finish is not None}
            self._changed.notify_all()

    def ask(self, message: Profile | EndProfile) -> Profiled:
        self.engine.core.post(message)
        with self._changed:
            assert self._changed.wait_for(lambda: message.id in self.answers, WAIT_S)
        return self.answers[message.id]

    def run(self, name: str) -> None:
        """A request of one step for its prompt and three of decoding."""
        self.engine.core.post(Submit(name, prompt(1), SHORT))
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.done, WAIT_S)


@pytest.fixture
def asking(request: pytest.FixtureRequest) -> Iterator[Asking]:
    made = Asking(**getattr(request, "param", {}))
    yield made
    made.engine.__exit__()


def operations(file: str) -> list[str]:
    """Names of what a trace holds."""
    with gzip.open(file, "rt") as text:
        return [event.get("name", "") for event in json.load(text)["traceEvents"]]


def written(folder: Path, count: int = 1) -> list[Path]:
    """The traces in a folder, once they are there."""
    limit = time.monotonic() + WAIT_S
    while len(found := sorted(folder.glob("[!.]*.trace.json.gz"))) < count:
        assert time.monotonic() < limit
        time.sleep(0.02)
    return found


THREADS = {"tp": 2, "collectives": "threads"}


@pytest.mark.parametrize(
    ("asking", "name"),
    [({}, "p-TP-0"), (THREADS, "p-TP-0-1"), ({"dp": 2}, "p-DP-0-TP-0")],
    indirect=["asking"],
    ids=["one rank", "threads", "replica"],
)
def test_from_a_start_to_a_stop(asking: Asking, name: str, tmp_path: Path) -> None:
    asking.run("before")
    folder = tmp_path / "made" / "here"
    assert asking.ask(Profile("a", str(folder), "p")) == Profiled("a")
    asking.run("b")
    answer = asking.ask(EndProfile("c"))
    assert answer.error is None
    assert answer.files == [str(folder / f"{name}.trace.json.gz")]
    assert any(operation.startswith("aten::") for operation in operations(answer.files[0]))
    asking.run("after")


def test_it_ends_by_itself_after_its_steps_and_another_may_begin(asking: Asking, tmp_path: Path) -> None:
    assert asking.ask(Profile("a", str(tmp_path), "one", num_steps=1)).error is None
    asking.run("a")
    (first,) = written(tmp_path)
    while asking.ask(Profile(f"b{time.monotonic()}", str(tmp_path), "four", num_steps=4)).error:
        time.sleep(0.01)  # the engine has not heard yet that the file is whole
    asking.run("b")
    files = written(tmp_path, 2)
    one, four = (sum(o == "aten::embedding" for o in operations(str(f))) for f in (first, files[0]))
    assert four == 4 * one > 0, "each step looks its tokens up once"
    end = asking.ask(EndProfile("c"))
    assert end.error is not None
    assert "no profile runs" in end.error
    assert str(files[0]) in end.error


def test_it_begins_at_a_step(asking: Asking, tmp_path: Path) -> None:
    asking.ask(Profile("a", str(tmp_path), "late", first_step=3, num_steps=1))
    asking.run("a")
    (file,) = written(tmp_path)
    assert sum(o == "aten::embedding" for o in operations(str(file))) == 1


def test_what_cannot_be_is_told(asking: Asking, tmp_path: Path) -> None:
    none = asking.ask(EndProfile("a")).error
    assert none == "no profile runs; start one first (/start_profile)"
    taken = tmp_path / "file"
    taken.touch()
    unwritable = asking.ask(Profile("b", str(taken / "x"), "p")).error
    assert unwritable is not None
    assert f"the folder '{taken / 'x'}' cannot be written" in unwritable
    assert asking.ask(Profile("c", str(tmp_path), "p", first_step=10**6)).error is None
    assert asking.ask(Profile("d", str(tmp_path), "q")).error == "profile 'p' runs; end it first (/stop_profile)"
    asking.run("e")
    never = asking.ask(EndProfile("f"))
    assert never.error == "rank 0: step 1000000 (start_step) did not come"
    assert never.files == []


def test_a_trace_that_cannot_be_written_or_begun_is_told_and_the_engine_goes_on(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    assert asking.ask(Profile("a", str(folder), "p")).error is None
    folder.rmdir()
    asking.run("a")
    error = asking.ask(EndProfile("b")).error
    assert error is not None
    assert str(folder) in error

    def refuse(self: object) -> None:
        raise RuntimeError("somebody else profiles")

    monkeypatch.setattr(profiling.profile, "__enter__", refuse)
    assert asking.ask(Profile("c", str(tmp_path), "p")).error is None
    assert asking.ask(EndProfile("d")).error == "rank 0: the profiler could not start"
    asking.run("e")
