"""Promise: where one rank has no memory to record a size, no rank has it, and all go on."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from assets.abacus import model as packaged
from run.fake_recorder import FakeRecorder
from run.injected import inject
from run.test_loop import Engine
from run.test_processes import flags_of
from tessera.comm.rehearsal import Rehearsing
from tessera.core.config import Resolved
from tessera.core.config.types import GraphSizes
from tessera.core.errors import CapacityError
from tessera.core.messages import Outputs, SamplingParams, Submit
from tessera.run import build
from tessera.run.core import EngineCore
from tessera.run.graphs import CudaGraphs
from tessera.run.group import Group
from tessera.run.recording import ALONE, TOGETHER, Act, missing, record
from tiny import resolved, serve, tiny_model

SIZES = GraphSizes(rows=(1, 2, 4), segments=(8,), tokens=(16, 64))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
REQUESTS = [Submit(f"r{i}", [5 + i, 9, 7 + 2 * i], GREEDY) for i in range(4)]
DP: dict[str, Any] = {"tp": 2, "dp": 2, "enable_dp_attention": True}
WAIT_S = 60.0


def with_graphs(found: Resolved) -> Resolved:
    kernels = replace(found.config.kernels, graphs=SIZES)
    return replace(found, config=replace(found.config, kernels=kernels))


class Recording(Engine):
    """An engine whose steps are recorded, on a CPU. `model`: what it serves."""

    def __init__(self, model: Any, **flags: Any) -> None:
        self.model = model
        super().__init__(**flags)

    def _make(self, **flags: Any) -> EngineCore:
        # One step at a time: without a device to copy from, what a graph gives is overwritten by its next run.
        found = with_graphs(resolved(self.model.spec, disable_overlap_schedule=True, **flags))
        return EngineCore(found, self.model.spec, self.model.source, self._sink)

    def answers(self) -> dict[str, list[int]]:
        """What was answered to all requests, after all that could be recorded is."""
        waited = threading.Event()
        while self.core.recordings.num_left or self.core.recordings.under_way:
            assert not waited.wait(0.01)
            assert self.fatal() is None, self.fatal()
        for submit in REQUESTS:
            self.core.post(submit)
        while sum(o.finish is not None for o in self.outputs()) < len(REQUESTS):
            assert not waited.wait(0.01)
            assert self.fatal() is None, self.fatal()
        return {
            s.request_id: [t for o in self.outputs() if o.request_id == s.request_id for t in o.tokens]
            for s in REQUESTS
        }

    def outputs(self) -> list[Any]:
        return [output for message in list(self.said) if isinstance(message, Outputs) for output in message.items]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakeRecorder]]:
    """Makes the recorders of ranks fakes; those of rank `at` lack memory."""
    made: list[FakeRecorder] = []
    comms: list[Rehearsing] = []

    def noted(comm: Any) -> Rehearsing:
        comms.append(Rehearsing(comm))
        return comms[-1]

    def lacking(at: int, lacks: str, smallest: int) -> list[FakeRecorder]:
        def make(kept: int) -> FakeRecorder:
            made.append(FakeRecorder(comms[-1], lacks if len(made) == at else "", smallest))
            return made[-1]

        monkeypatch.setattr(build, "Rehearsing", noted)
        monkeypatch.setattr(build, "CudaGraphs", make)
        return made

    return lacking


@pytest.mark.parametrize("flags", [{"tp": 2}, DP], ids=["tp", "dp"])
@pytest.mark.parametrize(("at", "lacks"), [(0, "rehearse"), (1, "rehearse"), (0, "record"), (1, "record")])
def test_steps_that_no_rank_could_record_run_as_they_are(
    at: int, lacks: str, flags: dict[str, Any], recorders: Callable[..., list[FakeRecorder]]
) -> None:
    recorders(at, lacks, 1)
    model = tiny_model("qwen3")
    with Recording(model, dtype="float64", **flags) as engine:
        found = engine.answers()
        group = engine.core.runner
        assert isinstance(group, Group)
        assert not any(runner.graphs._recorded for runner in group.runners)  # type: ignore[union-attr]
    alone = serve(model, REQUESTS, dtype="float64")
    assert found == {s.request_id: alone.answers[s.request_id, 0].tokens for s in REQUESTS}


@pytest.mark.parametrize("flags", [{"tp": 2}, DP], ids=["tp", "dp"])
@pytest.mark.parametrize(("at", "lacks"), [(0, "rehearse"), (1, "record"), (-1, "")])
def test_smaller_sizes_are_recorded_on_all_ranks(
    at: int, lacks: str, flags: dict[str, Any], recorders: Callable[..., list[FakeRecorder]],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Steps of 4 rows find no memory on one rank; those of 1 and 2 do. (What a graph computes is not asked: plain torch
    reads a step's numbers on the host.)"""
    made, model = recorders(at, lacks, 4), tiny_model("qwen3")
    with caplog.at_level(logging.WARNING), Recording(model, dtype="float64", **flags) as engine:
        group = engine.core.runner
        assert isinstance(group, Group)
        engine.answers()
        recorded = [set(runner.graphs._recorded) for runner in group.runners]  # type: ignore[union-attr]
    assert recorded[0] == recorded[1], "ranks that disagree meet in other collectives"
    rows = {1, 2} if lacks else {1, 2, 4}
    assert {size.num_segments for size in recorded[0] if size.one_each} == rows
    assert len({recorder.replayed for recorder in made}) == 1, "they replay the same steps"
    assert made[0].replayed or (lacks and "dp" not in flags)
    told = [r.getMessage() for r in caplog.records]
    expected = f"steps of 4 tokens (4 ranges) as a CUDA graph: rank {at}: Tried to allocate 2.00 GiB. GPU 1 has 1.00"
    assert [expected in text for text in told] == [True] * bool(lacks)


def test_a_rank_without_others_goes_on_too(
    recorders: Callable[..., list[FakeRecorder]], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen3")
    made = recorders(0, "record", 1)
    with caplog.at_level(logging.WARNING), Recording(model, dtype="float64") as engine:
        found = engine.answers()
    alone = serve(model, REQUESTS, dtype="float64")
    assert found == {s.request_id: alone.answers[s.request_id, 0].tokens for s in REQUESTS}
    assert made[0].captured == []
    told = [r.getMessage() for r in caplog.records]
    assert 1 <= len(told) <= 3, "4, 2 and 1 rows, in whatever order they were met; larger ones are not tried any more"
    assert all("rank 0: Tried to allocate" in text for text in told), told


def test_mutant_without_a_rehearsal_the_others_wait_for_a_rank_that_has_failed(
    recorders: Callable[..., list[FakeRecorder]],
) -> None:
    """What goes wrong among the others cannot be mended: it ends the engine, and says that it was memory."""
    recorders(1, "meet", 4)
    with Recording(tiny_model("qwen3"), tp=2) as engine:
        engine.thread.join(WAIT_S)
    fatal = engine.fatal()
    assert fatal is not None
    assert "out of memory" in fatal.error


LACKING = """
if rank >= 0:
    from run.fake_recorder import FakeRecorder
    from tessera.comm.rehearsal import Rehearsing
    from tessera.run import build
    comms = []
    build.Rehearsing = lambda comm: comms.append(Rehearsing(comm)) or comms[-1]
    build.CudaGraphs = lambda kept: FakeRecorder(comms[-1], {lacks!r} if rank == 1 else "", 1)
"""


@pytest.mark.parametrize("lacks", ["rehearse", "record"])
def test_ranks_that_are_processes(
    lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = packaged("abacus-mla")
    flags = flags_of("abacus-mla", tp=2, collectives="gloo")
    inject(LACKING.replace("{lacks!r}", repr(lacks)), tmp_path, monkeypatch)  # rank 1 lacks memory
    with caplog.at_level(logging.WARNING), Recording(model, **flags) as engine:
        found = engine.answers()
    alone = serve(model, REQUESTS, dtype="float32")
    assert found == {s.request_id: alone.answers[s.request_id, 0].tokens for s in REQUESTS}
    told = [r.getMessage() for r in caplog.records]
    expected = "steps of 4 tokens (4 ranges) as a CUDA graph: rank 1: Tried to allocate"
    assert expected in told[0]
    assert len(told) == 2, "of 4 rows, and of 1"


@pytest.mark.parametrize("acts", [ALONE, TOGETHER])
def test_nothing_follows_an_act_that_failed_but_its_undoing(acts: tuple[Act, ...]) -> None:
    for failing in acts:
        told: list[str] = []

        def tell(act: Act, failing: Act = failing, told: list[str] = told) -> dict[int, str]:
            told.append(act)
            return {0: "", 1: "no memory" if act == failing else ""}

        with pytest.raises(CapacityError, match="rank 1: no memory"):
            record(acts, tell)
        done = [*acts[: acts.index(failing) + 1]]
        assert told == ([*done, "drop"] if failing == "record" else done)


def test_what_is_missing_is_told_in_short() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 1.19 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    found = missing(torch.OutOfMemoryError(said))
    assert found == "Tried to allocate 1.19 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free"
    assert missing(torch.OutOfMemoryError("2 GiB are needed. 1 GiB are free")) == "2 GiB are needed. 1 GiB are free"


@pytest.mark.parametrize(("free", "kept", "fits"), [(1000, 0, True), (900, 800, False), (100, 0, False)])
def test_what_steps_need_is_left_free(free: int, kept: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In MiB: 100 were held when the stage ran, of which earlier graphs have 20."""
    mib = 1 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * mib, 2000 * mib))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    recorder = CudaGraphs(kept * mib)
    recorder._needed, recorder._pooled = 100 * mib, 20 * mib
    if fits:
        recorder._check()
        return
    with pytest.raises(torch.OutOfMemoryError, match=r"152.00 MiB are needed. .* MiB of 1.95 GiB are free"):
        recorder._check()


class Stream:
    """A stream of no device, which notes for whom it waits."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


held: list[weakref.ref[torch.Tensor]] = []


def no_memory() -> Any:
    """A stage that holds a tensor when it finds none; `held` tells whether anybody still does."""
    tensor = torch.zeros(1)
    held.append(weakref.ref(tensor))
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """That of the steps, then those that are made; memory that nobody counts."""
    made = [Stream()]
    for name, value in {
        "Stream": lambda: made.append(Stream()) or made[-1],
        "current_stream": lambda: made[0],
        "stream": lambda stream: nullcontext(),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (1 << 40, 1 << 40),
        "CUDAGraph": lambda: SimpleNamespace(reset=lambda: None),
        "graph": lambda graph, **options: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_steps_come_after_a_rehearsal_that_had_no_memory(streams: list[Stream]) -> None:
    """Known fault: they did not, and wrote over the columns that its kernels had still to read: those then found pages
    of others, which they write."""
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs().warm(no_memory)
    assert streams[0].waited == [streams[1]]


def test_a_recording_that_had_no_memory_holds_none(streams: list[Stream]) -> None:
    """Known fault: until the collector came, which may take minutes."""
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as raised:
            CudaGraphs().capture(no_memory)
        del raised
        assert held[-1]() is None
    finally:
        gc.enable()
