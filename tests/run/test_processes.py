"""Ranks as processes answer as one rank does; one that dies is noticed and named, and nothing is ever left running."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from assets.abacus import model, prompt, questions
from run.test_loop import LONG, Engine
from tessera.core.errors import CapacityError, ConfigError, DeadlineError, ModelError, PeerError, TesseraError
from tessera.core.messages import Abort, Output, Outputs, SamplingParams, Submit
from tessera.models.folder import find_model
from tessera.plan.handoff import Written
from tessera.plan.step import PartDone, Step, StepDone, empty_part, ints
from tessera.run import processes
from tessera.run.core import EngineCore
from tessera.run.graphs import Size
from tessera.run.hub import Hub
from tessera.run.mailbox import Mailbox
from tessera.run.processes import Processes, Tell, unheard
from tessera.run.report import Tally
from tessera.run.wire import Done, Drop, Failed, Hello, Kept, Loaded, Record, Told, encode
from tiny import Run, resolved, serve
from waits import NOTICED_S, PATIENCE_S, wait_until

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=60)
BASE: dict[str, Any] = {"dtype": "float32", "page_size": 16, "max_total_tokens": 8192}
DP: dict[str, Any] = {"dp": 2, "enable_dp_attention": True}
POINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp 2": ("abacus-hybrid", {"tp": 2}),
    "dp-attention, mixed": ("abacus-mla", {"tp": 2, **DP, "enable_mixed_chunk": True, "chunked_prefill_size": 40}),
    "tp 4, dp 2, ep 2": ("abacus-mla", {"tp": 4, "ep": 2, **DP}),
    "dense tp 1": ("abacus-mla", {"tp": 2, "moe_dense_tp_size": 1, "disable_overlap_schedule": True}),
    "dp-lm-head": ("abacus-hybrid", {"tp": 2, **DP, "enable_dp_lm_head": True}),
    "gloo": ("abacus-hybrid", {"tp": 2, **DP, "ep": 2, "collectives": "gloo"}),
}


def ranks() -> list[psutil.Process]:
    """Processes of ranks that this one has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "tessera.run.rank" in child.cmdline():
                found.append(child)
    return found


def flags_of(name: str, **flags: Any) -> dict[str, Any]:
    return {**BASE, "model_path": str(find_model(name)), "collectives": "shared", **flags}


@cache
def requests(name: str) -> list[Submit]:
    """Questions, one with choices that are drawn, one whose prompt is scored only."""
    asked = [prompt(name, question) for task in ("gsm8k", "recall") for question in questions(task, 4)]
    drawn = msgspec.structs.replace(GREEDY, temperature=0.7, seed=3, logprobs=2, max_new_tokens=12)
    scored = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
    plain = [Submit(f"q{i}", tokens, GREEDY) for i, tokens in enumerate(asked)]
    return [*plain, Submit("drawn", asked[0], drawn, n=2), Submit("scored", asked[1], scored)]


@cache
def alone(name: str) -> Run:
    return serve(model(name), requests(name), **BASE)


def logprobs(run: Run, kind: str, key: tuple[str, int]) -> list[float]:
    return [e.logprob for e in getattr(run.answers[key], kind) if e.logprob is not None]


@pytest.mark.parametrize("point", POINTS)
def test_ranks_that_are_processes_answer_as_one(point: str) -> None:
    name, flags = POINTS[point]
    seen: set[int] = set()
    run = serve(model(name), requests(name), also=lambda *_: seen.add(len(ranks())), **flags_of(name, **flags))
    assert seen == {flags["tp"]}
    assert run.ends() == alone(name).ends()
    assert {r.dp_rank for r in run.reports if r.num_new_token} == set(range(flags.get("dp", 1)))
    riding = any(r.label == "MIXED" and r.num_running > r.num_new_seq for r in run.reports)
    assert riding or "mixed" not in point
    for kind, key in (("logprobs", ("drawn", 0)), ("logprobs", ("drawn", 1)), ("prompt_logprobs", ("scored", 0))):
        assert logprobs(run, kind, key) == pytest.approx(logprobs(alone(name), kind, key), abs=1e-4)
    assert not ranks()


class Multi(Engine):
    """An engine of two ranks, in a thread."""

    def _make(self, **flags: Any) -> EngineCore:
        made = model("abacus-mla")
        found = resolved(made.spec, **flags_of("abacus-mla", tp=2, **flags))
        return EngineCore(found, made.spec, made.source, self._sink)


def test_nothing_is_left_of_an_engine_whose_start_fails_after_its_ranks_are_there() -> None:
    made = model("abacus-mla")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": taken.getsockname()[1]}
        found = resolved(made.spec, **flags_of("abacus-mla", tp=2, **port))
        with pytest.raises(ConfigError, match="cannot listen"):
            EngineCore(found, made.spec, made.source, lambda message: None)
    assert not ranks()


def outputs(engine: Engine) -> list[Output]:
    return [output for message in list(engine.said) if isinstance(message, Outputs) for output in message.items]


def test_what_was_dropped_does_not_come_out_and_a_rank_that_is_killed_ends_all_in_time() -> None:
    made: list[Multi] = []
    maker = threading.Thread(target=lambda: made.append(Multi()))  # the ranks outlive the thread that asks for them
    maker.start()
    maker.join()
    (engine,) = made
    for i in range(3):
        engine.core.post(Submit(f"r{i}", [5 + i, 6, 7], LONG))
    with engine:
        for rank in ranks():  # a terminal's Ctrl-C and `systemctl stop` are for others to answer
            rank.send_signal(signal.SIGINT)
            rank.send_signal(signal.SIGTERM)
        wait_until(lambda: len(outputs(engine)) > 6)
        engine.core.post(Abort("r0"))
        wait_until(lambda: any(o.finish == "abort" for o in outputs(engine)))
        engine.core.post(Submit("r0", [5, 6, 7], LONG))  # the name is free again
        before = len(outputs(engine))
        wait_until(lambda: any(o.request_id == "r0" for o in outputs(engine)[before:]))
        (victim,) = [r for r in ranks() if '"rank":1' in r.cmdline()[-1]]
        began = time.monotonic()
        victim.kill()
        engine.thread.join(PATIENCE_S)
        assert not engine.thread.is_alive()
        assert time.monotonic() - began < NOTICED_S
        fatal = engine.fatal()
        assert fatal is not None
        assert f"rank 1 (process {victim.pid}) was ended by SIGKILL" in fatal.error
        last = {o.request_id: o for o in outputs(engine)}
        assert {key: (o.finish, o.fault) for key, o in last.items()} == dict.fromkeys(
            ("r0", "r1", "r2"), ("error", "engine")
        )
        ends = [o for o in outputs(engine) if o.request_id == "r0" and o.finish is not None]
        assert [o.finish for o in ends] == ["abort", "error"]
    assert not ranks()


def test_a_rank_that_dies_while_nothing_runs_is_noticed() -> None:
    engine = Multi()
    with engine:
        wait_until(lambda: engine.said)
        began = time.monotonic()
        ranks()[0].kill()
        engine.thread.join(PATIENCE_S)
        assert time.monotonic() - began < NOTICED_S
        fatal = engine.fatal()
        assert fatal is not None
        assert "rank 0" in fatal.error
        assert "SIGKILL" in fatal.error
    assert not ranks()


def test_a_rank_that_hangs_is_named_by_who_waits_for_it_and_is_not_left_behind() -> None:
    """Known fault: only ranks that answer were named, and those were not the ones that hang."""
    engine = Multi(watchdog_timeout=2)
    engine.core.post(Submit("r", [5, 6, 7], LONG))
    with engine:
        wait_until(lambda: len(outputs(engine)) > 3)
        (victim,) = [r for r in ranks() if '"rank":1' in r.cmdline()[-1]]
        victim.suspend()
        last = engine.ended()
        assert last["r", 0].finish == "error"
        fatal = engine.fatal()
        assert fatal is not None
        assert re.search(r"rank 0: DeadlineError: rank 0 waited 2.0 s in .* for ranks \[1\]", fatal.error)
    assert not ranks()


def test_a_rank_that_fails_says_why_and_the_others_wait_for_nobody() -> None:
    engine = Multi(**DP)
    launch, calls = engine.core.runner.launch, iter(range(1000))

    def broken(step: Step) -> Any:
        if next(calls) == 3:
            first, second = step.parts
            assert len(second.rows)
            step = replace(step, parts=(first, replace(second, rows=second.rows + 1000)))
        return launch(step)

    engine.core.runner.launch = broken  # type: ignore[method-assign]
    for i in range(2):
        engine.core.post(Submit(f"r{i}", [5 + i, 6, 7], LONG))
    with engine:
        began = time.monotonic()
        last = engine.ended()
        assert time.monotonic() - began < NOTICED_S
        assert {output.finish for output in last.values()} == {"error"}
        fatal = engine.fatal()
        assert fatal is not None
        assert fatal.error.startswith("PeerError: rank 1: IndexError: index 10")
    assert not ranks()


def test_what_a_rank_says_of_itself_explains_more_than_what_others_say_of_it() -> None:
    hub, context = Hub(2), zmq.Context()
    try:
        for rank, kind in ((0, "PeerError"), (1, "ValueError")):
            with context.socket(zmq.DEALER) as link:
                link.routing_id = str(rank).encode()
                link.connect(hub.address)
                link.send(encode(Failed(kind, "it is so")))
        with pytest.raises(PeerError, match="rank 1: ValueError: it is so"):
            hub.receive(PATIENCE_S)
    finally:
        hub.close(0)
        context.term()


def test_a_rank_of_another_host_that_has_gone_is_named_and_not_what_others_say_of_it() -> None:
    hub, context = Hub(2), zmq.Context()
    try:
        with context.socket(zmq.DEALER) as link:
            link.routing_id = b"0"
            link.connect(hub.address)
            with context.socket(zmq.DEALER) as other:
                other.routing_id = b"1"
                other.connect(hub.address)
                other.send(encode(Hello()))
                assert hub.receive(PATIENCE_S) == (1, Hello())
            link.send(encode(Failed("PeerError", "rank 0 in sum over 'tp': Connection reset by peer. GLHF!")))
            with pytest.raises(PeerError, match=r"^ranks \[1\] on other hosts have gone, or cannot be reached$"):
                hub.receive(PATIENCE_S)
    finally:
        hub.close(0)
        context.term()


def test_an_address_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--dist-init-addr {address}: cannot listen there: Address already"):
            Hub(2, address)


class Scripted:
    """A hub whose ranks say what is written down."""

    def __init__(self, num_ranks: int, *_: object) -> None:
        self.script: list[tuple[int, Any]] = [(r, m) for m in (Hello(), Loaded()) for r in range(num_ranks)]
        self.sent: list[tuple[Any, list[int]]] = []

    def send(self, message: Any, to: Any) -> None:
        self.sent.append((message, list(to)))

    def receive(self, seconds: float, also: int | None = None) -> tuple[int, Any] | None:
        """Where the script has nothing more, the time is over at once."""
        return self.script.pop(0) if self.script else None

    def start(self, *arguments: Any) -> None:
        """They are here."""

    def why(self, first: TesseraError) -> TesseraError:
        """Nobody knows better."""
        return first

    def met(self) -> None:
        """Nothing to clear away."""

    def close(self, seconds: float) -> None:
        """Nobody to end."""


def scripted(
    monkeypatch: pytest.MonkeyPatch, tell: Tell = unheard, silence: float = 60.0, **flags: Any
) -> tuple[Processes, Scripted]:
    monkeypatch.setattr(processes, "Hub", Scripted)
    config = resolved(model("abacus-mla").spec, **flags_of("abacus-mla", **flags)).config
    serving = replace(config.serving, watchdog_timeout=silence, start_timeout=2 * silence)
    made = Processes(replace(config, serving=serving), tell=tell)
    hub = made._hub
    assert isinstance(hub, Scripted)
    return made, hub


def test_ranks_that_have_met_are_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a start may be silent bounds what comes before their meeting, that, and what comes after it, each by
    itself."""
    monkeypatch.setattr(processes, "Hub", Scripted)
    told: list[tuple[int, int]] = []
    Processes(resolved(model("abacus-mla").spec, **flags_of("abacus-mla", tp=2)).config, lambda *far: told.append(far))
    assert told == [(0, 1)] * 2, "ranks that are quick say nothing of what they load"


def done(index: int, request_id: str) -> Done:
    part = PartDone(ints([0]), np.array([[7]], np.int32), np.array([False]))
    return Done(StepDone(index, (part,)), [Output(request_id, 0, [7])], [Tally("DECODE", 0, 0, 0)])


def test_what_a_rank_says_of_a_dropped_choice_is_dropped_until_its_name_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, hub = scripted(monkeypatch, tp=2)
    tickets = [made.launch(Step(index, (empty_part(),))) for index in (0, 1)]
    made.drop("a", 0)  # the rank has not heard of it yet
    tickets.append(made.launch(Step(2, (empty_part(),))))
    assert hub.sent[-2] == (Drop("a", 0), [0])
    hub.script += [(0, done(0, "a")), (0, done(1, "a")), (0, done(2, "a"))]
    assert [len(made.collect(ticket)[1]) for ticket in tickets] == [0, 0, 1]
    assert tickets[0].tallies == [Tally("DECODE", 0, 0, 0)]


def test_recording_waits_for_all_ranks_and_names_those_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hub = scripted(monkeypatch, tp=2, silence=0.1)
    ticket, size = made.launch(Step(0, (empty_part(),))), Size(4, 4, True)
    hub.script += [(1, Kept()), (0, done(0, "a")), (0, Kept()), *2 * [(0, Kept()), (1, Kept())]]
    made.record(size)
    assert [sent for sent, _ in hub.sent[-3:]] == [Record(size, act) for act in ("rehearse", "meet", "record")]
    assert all(list(ranks) == [0, 1] for _, ranks in hub.sent[-3:])
    assert len(made.collect(ticket)[1]) == 1, "what came meanwhile is not lost"
    hub.script += [(0, Kept())]
    with pytest.raises(DeadlineError, match=r"ranks \[1\] are not through with .* \(rehearse\) in 0.2 s"):
        made.record(size)


@pytest.mark.parametrize("act", ["rehearse", "record"])
def test_where_a_rank_lacks_memory_no_rank_keeps_the_recording(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, hub = scripted(monkeypatch, tp=2)
    size, both = Size(4, 4, True), [(0, Kept()), (1, Kept())]
    before = {"rehearse": 0, "record": 2}[act]
    hub.script += [*before * both, (0, Kept()), (1, Kept("2 GiB are needed"))]
    if act == "record":
        hub.script += both
    with pytest.raises(CapacityError, match="rank 1: 2 GiB are needed"):
        made.record(size)
    assert not hub.script
    last = hub.sent[-1][0]
    assert last == Record(size, "drop" if act == "record" else "rehearse")


def test_parts_come_in_the_order_of_data_parallel_ranks_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hub = scripted(monkeypatch, tp=4, **DP)
    tickets = [made.launch(Step(index, (empty_part(), empty_part()))) for index in (0, 1)]
    hub.script += [(2, done(0, "b")), (2, done(1, "b")), (0, done(0, "a")), (0, done(1, "a"))]
    for ticket in tickets:
        found, outputs = made.collect(ticket)
        assert [output.request_id for output in outputs] == ["a", "b"]
        assert (found.index, len(found.parts), len(ticket.tallies)) == (ticket.index, 2, 2)


def test_ranks_that_stay_silent_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hub = scripted(monkeypatch, tp=4, **DP, silence=0.1)
    ticket = made.launch(Step(0, (empty_part(), empty_part())))
    hub.script.append((0, done(0, "a")))
    with pytest.raises(DeadlineError, match=r"ranks \[2\] have not finished step 0 in 0.1 s"):
        made.collect(ticket)
    hub.script.append((3, Loaded()))
    with pytest.raises(PeerError, match="rank 3 said Loaded out of turn"):
        made.wait(None, None, 0)


def test_what_ranks_have_written_is_told_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    box: Mailbox[Any] = Mailbox()
    made, hub = scripted(monkeypatch, box.put, tp=4, **DP)
    ticket = made.launch(Step(0, (empty_part(), empty_part())))
    hub.script += [(0, done(0, "a")), (1, Told(Written(7, 1)))]
    assert not made.wait(ticket, box.there, 60.0), "rank 2 computes"
    assert box.take() == [Written(7, 1)]
    hub.script.append((2, done(0, "b")))
    assert made.wait(ticket, box.there, 60.0)
    assert len(made.collect(ticket)[1]) == 2
    hub.script.append((3, Told(Written(8, 3))))
    assert not made.wait(None, box.there, 60.0)
    assert box.take() == [Written(8, 3)]


def test_news_do_not_put_off_the_deadline_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hub = scripted(monkeypatch, tp=2, silence=0.1)
    ticket = made.launch(Step(0, (empty_part(),)))
    with pytest.raises(DeadlineError, match=r"ranks \[0\] have not finished step 0 in 0.1 s"):
        wait_until(lambda: hub.script.append((1, Told(Written(7, 1)))) or made.wait(ticket, 0, 60.0))


def test_a_hub_hears_its_ranks_or_a_file() -> None:
    hub, context, box = Hub(1), zmq.Context(), Mailbox[int]()
    try:
        box.put(1)
        assert hub.receive(60.0, box.there) is None
        with context.socket(zmq.DEALER) as link:
            link.routing_id = b"0"
            link.connect(hub.address)
            link.send(encode(Hello()))
            assert hub.receive(60.0) == (0, Hello()), "a file that nobody asked about is nothing"
            link.send(encode(Hello()))
            wait_until(lambda: hub.receive(60.0, box.there) == (0, Hello()))
            box.take()
            assert hub.receive(0.01, box.there) is None
    finally:
        hub.close(0)
        context.term()


def test_ranks_that_do_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "receive", lambda self, seconds, also=None: None)
    with pytest.raises(DeadlineError, match=r"ranks \[0, 1\] did not say Hello for"):
        scripted(monkeypatch, tp=2)


def test_ranks_that_come_one_by_one_do_not_put_off_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known fault: each that came gave the others all of the time anew, of which whoever watches the start knew
    nothing."""
    asked: list[float] = []

    def receive(self: Scripted, seconds: float, also: int | None = None) -> tuple[int, Any] | None:
        asked.append(seconds)
        time.sleep(0.05)
        return self.script.pop(0)

    monkeypatch.setattr(Scripted, "receive", receive)
    scripted(monkeypatch, tp=4)
    assert asked[:4] == sorted(asked[:4], reverse=True)
    assert asked[3] < asked[0] - 0.1, "while they meet it is all one wait"


def test_a_start_that_fails_is_refused_by_the_rank_and_leaves_nothing(tmp_path: Path) -> None:
    made = model("abacus-mla")
    for file in find_model("abacus-mla").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = resolved(made.spec, **{**flags_of("abacus-mla", tp=2), "model_path": str(tmp_path)}).config
    with pytest.raises(ModelError, match="safetensors"):
        Processes(config)
    assert not ranks()
