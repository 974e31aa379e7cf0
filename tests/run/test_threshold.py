"""Promise: a step runs as two halves from the size on where that was seen to pay, on all ranks, and else not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assets.abacus import model as packaged
from run.fake_recorder import LACKING
from run.injected import inject
from run.test_processes import BASE, flags_of, requests
from tessera.core.errors import PeerError
from tessera.core.messages import Submit
from tessera.plan.config import PlannerConfig
from tessera.plan.scheduler import Planner
from tessera.plan.step import Step
from tessera.run import core as cores
from tessera.run.core import EngineCore
from tessera.run.group import Group
from tessera.run.pools import Pools
from tessera.run.recording import Act
from tessera.run.threshold import BUDGET_S, PAYS, ROUNDS, Threshold, measure
from tessera.run.trials import Trials
from test_invariance import alone, model
from test_invariance import requests as varied
from tiny import resolved, serve, tiny_model

CONFIG = PlannerConfig(max_running=8, num_pages=5000, page_size=16, max_context=4096, num_dp=2, chunk_size=4096)
TBO: dict[str, Any] = {"enable_two_batch_overlap": True}
DP: dict[str, Any] = {"dp": 2, "enable_dp_attention": True}
Seconds = Callable[[int, bool], float]  # of a step of so many tokens, whole or as halves
NEVER = 10**6  # tokens


class Ranks:
    """Ranks whose steps take what a function says, by a clock that only they move. `lacks`: tokens from which on the
    second of two has no memory."""

    def __init__(self, seconds: Seconds, lacks: float = float("inf")) -> None:
        self.now, self.acts = 100.0, list[tuple[Act, int, bool]]()
        self._seconds, self._lacks = seconds, lacks

    def __call__(self, act: Act, step: Step) -> dict[int, str]:
        size, halves = step.parts[0].num_tokens, bool(step.cuts)
        self.acts.append((act, size, halves))
        if act == "rehearse":
            return {0: "", 1: "2 GiB are needed" if size <= self._lacks < float("inf") else ""}
        self.now += self._seconds(size, halves)
        return {0: "", 1: ""}

    def clock(self) -> float:
        return self.now


def measured(
    seconds: Seconds, smallest: int = 2, lacks: float = float("inf"), **config: Any
) -> tuple[Threshold, Ranks]:
    ranks = Ranks(seconds, lacks)
    settings = {name: getattr(CONFIG, name) for name in CONFIG.__slots__} | config
    return measure(PlannerConfig(**settings), smallest, ranks, ranks.clock), ranks


def pays_from(size: int) -> Seconds:
    return lambda n, halves: n * 1e-6 * (0.9 if halves and n >= size else 1.0)


@given(st.integers(2, 10_000))
def test_steps_are_split_from_the_smallest_tried_size_that_pays_and_no_other(size: int) -> None:
    found, ranks = measured(pays_from(size))
    tried = [4096 >> n for n in range(12)]
    assert found.split_from == min((n for n in tried if n >= size), default=0)
    sizes = [n for _, n, _ in ranks.acts]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= found.split_from // 2, "none is tried below one that did not pay"
    for prompt in (found.split_from - 1, found.split_from) if 2 < found.split_from < 4096 else ():
        planner = Planner(PlannerConfig(8, 5000, 16, 4096, chunk_size=4096, split_from=found.split_from, split_grain=1))
        planner.apply([Submit("a", [3] * prompt)])
        step = planner.next_step()
        assert step is not None
        assert bool(step.cuts) == (prompt == found.split_from)


@pytest.mark.parametrize("gain", [0.5, 1.0, PAYS - 0.001])
def test_what_does_not_clearly_pay_at_the_largest_size_never_splits(gain: float) -> None:
    found, ranks = measured(lambda n, halves: 0.1814 / gain if halves else 0.1814)
    assert (found.split_from, found.decision.value) == (0, "off")
    assert {n for _, n, _ in ranks.acts} == {4096}
    expected = f"measured: 4096 tokens take 181.4 ms whole and {181.4 / gain:.1f} as halves"
    assert found.decision.why == expected


def test_what_is_told_holds_the_size_that_pays_and_the_one_that_does_not() -> None:
    found, _ = measured(pays_from(1000))
    assert str(found.decision) == (
        "two-batch overlap: steps of 1024 tokens or more (measured: "
        "1024 tokens take 1.0 ms whole and 0.9 as halves; 512 tokens take 0.5 ms whole and 0.5 as halves)"
    )


def test_nothing_smaller_is_tried_than_asked() -> None:
    found, ranks = measured(pays_from(2), smallest=2049)
    assert (found.split_from, min(n for _, n, _ in ranks.acts)) == (4096, 4096)


def test_forms_take_turns_and_a_hiccup_changes_nothing() -> None:
    """A timed step that others held up counts for nothing: the shortest of each form does."""
    calls: list[bool] = []

    def seconds(n: int, halves: bool) -> float:
        calls.append(halves)
        return pays_from(4096)(n, halves) * (5 if len(calls) in (4, 7) else 1)

    found, ranks = measured(seconds, smallest=4096)
    assert found.split_from == 4096
    assert [act for act, _, _ in ranks.acts] == ["rehearse"] * 2 + ["meet"] * 2 * (1 + ROUNDS)
    assert [halves for _, _, halves in ranks.acts] == [False, True] * (2 + ROUNDS)


@pytest.mark.parametrize(("slow", "expected"), [((2, 3, 4), 0), ((2, 3), 4096)])
def test_halves_pay_only_where_most_turns_say_so(slow: tuple[int, ...], expected: int) -> None:
    """On a busy machine one good time of the halves shows nothing."""
    turns = {False: 0, True: 0}

    def seconds(n: int, halves: bool) -> float:
        turns[halves] += 1  # the first warms up
        return 0.9 if halves and turns[halves] - 1 not in slow else 1.2 if halves else 1.0

    assert measured(lambda n, h: seconds(n, h) / 10, smallest=4096)[0].split_from == expected


@pytest.mark.parametrize("each", [0.01, BUDGET_S / 4, 10 * BUDGET_S])
def test_it_ends_when_its_time_is_spent(each: float) -> None:
    _, ranks = measured(lambda n, halves: each * (0.9 if halves else 1.0))
    warmed, tried = 2 * each, {n for _, n, _ in ranks.acts}
    spent = ranks.now - 100.0 - warmed * len(tried)
    assert spent <= BUDGET_S + 4 * each, "two pairs that are timed, at most"


def test_what_compiles_before_the_first_turn_costs_no_turn() -> None:
    """Two GPUs compiled for four seconds, had two turns left, and took a gain of 5 % for noise."""
    calls: list[int] = []

    def seconds(n: int, halves: bool) -> float:
        calls.append(n)
        return (BUDGET_S if calls.count(n) <= 2 else 0.1) * (0.9 if halves else 1.0)

    _, ranks = measured(seconds, smallest=4096)
    assert len(ranks.acts) == 2 * (2 + ROUNDS)


def test_turns_that_disagree_are_told() -> None:
    times = iter([1.0, 1.0, 0.3, 0.2, 0.2, 0.4, 0.2, 0.4, 0.3, 0.2, 0.3, 0.4])
    found, _ = measured(lambda n, halves: next(times) - (0.02 if halves else 0.0), smallest=4096)
    assert found.decision.why.endswith("as halves, which won 2 of 5 turns")


def test_a_rank_without_memory_for_the_largest_step_is_named_and_nothing_is_split() -> None:
    found, ranks = measured(pays_from(2), lacks=1e9)
    assert (found.split_from, found.decision.value) == (0, "off")
    assert found.decision.why == "measured: 4096 tokens cannot be tried: rank 1: 2 GiB are needed"
    assert {act for act, _, _ in ranks.acts} == {"rehearse"}, "nobody met one that could not come"


def test_what_was_found_holds_where_memory_ends_later() -> None:
    def lacking(act: Act, step: Step) -> dict[int, str]:
        return {1: "odd"} if step.parts[0].num_tokens == 1024 else ranks(act, step)

    ranks = Ranks(pays_from(2))
    found = measure(CONFIG, 2, lacking, ranks.clock)
    assert found.split_from == 2048
    assert "1024 tokens cannot be tried: rank 1: odd" in found.decision.why


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets halves pay from so many tokens on, whatever the steps of an engine take."""

    def pay(size: int) -> None:
        seconds = pays_from(size)

        def fake(config: PlannerConfig, smallest: int, everywhere: Any) -> Threshold:
            now = [0.0]

            def timed(act: Act, step: Step) -> Any:
                said = everywhere(act, step)
                now[0] += seconds(step.parts[0].num_tokens, bool(step.cuts))
                return said

            return measure(config, smallest, timed, lambda: now[0])

        monkeypatch.setattr(cores, "measure", fake)

    return pay


def started(name: str, **flags: Any) -> EngineCore:
    """An engine of ranks as threads."""
    made = model(name)
    return EngineCore(resolved(made.spec, dtype="float64", **flags), made.spec, made.source, lambda message: None)


SHORT = {**TBO, "chunked_prefill_size": 64}  # few sizes to try, of few tokens
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"tp": 2}),
    ("hybrid", {"tp": 2}),
    ("hybrid", {"tp": 4, "ep": 2, **DP}),
    ("mla", {"tp": 2, **DP, "ep": 2, "moe_a2a_backend": "all_to_all"}),
]


def left_behind(core: EngineCore) -> list[str]:
    """What differs from an engine that has just started."""
    group, found = core.runner, []
    assert isinstance(group, Group)
    for rank, runner in enumerate(group.runners):
        found += [f"{rank} {name}" for name, pool in runner.pools.tensors.items() if pool.any()]
        table = runner.table
        if table.tokens.any() or table.pages.any() or table.slots.any() or table.taken().any():
            found.append(f"{rank} table")
    return found


@pytest.mark.parametrize(("name", "flags"), LAYOUTS)
def test_dry_steps_leave_nothing_behind(name: str, flags: dict[str, Any], paid: Callable[[int], None]) -> None:
    pays = 2 if name == "qwen3" else 32  # down to decodes, or a cut inside a sequence
    paid(pays)
    core = started(name, **SHORT, **flags)
    try:
        assert left_behind(core) == []
        assert core.stages.seconds["halves"] > 0
        assert core.planner.config.split_from == core.resolved.config.scheduling.split_from == pays
        core.planner.check()
    finally:
        core.runner.close()


def test_mutant_scratch_that_is_not_wiped_is_seen(monkeypatch: pytest.MonkeyPatch, paid: Callable[[int], None]) -> None:
    monkeypatch.setattr(Pools, "wipe_scratch", lambda self: None)
    paid(NEVER)
    core = started("hybrid", **SHORT, tp=2)
    core.runner.close()
    assert left_behind(core)


@pytest.mark.parametrize(("name", "flags", "pays"), [*((*layout, 24) for layout in LAYOUTS), (*LAYOUTS[-1], NEVER)])
def test_answers_are_those_of_one_rank_and_split_where_it_pays(
    name: str, flags: dict[str, Any], pays: int, paid: Callable[[int], None]
) -> None:
    paid(pays)
    run = serve(model(name), varied("varied"), dtype="float64", **SHORT, **flags)
    assert run.ends() == alone(name, "varied").ends()
    assert bool(run.halved) == (pays == 24)


def test_a_start_of_threads_tells_what_it_measured(caplog: pytest.LogCaptureFixture) -> None:
    made = tiny_model("qwen3")
    with caplog.at_level(logging.INFO, logger="tessera"):
        core = EngineCore(resolved(made.spec, tp=2, **TBO), made.spec, made.source, lambda message: None)
    core.runner.close()
    (told,) = [r.getMessage() for r in caplog.records if r.name == cores.__name__]
    assert told.startswith("two-batch overlap: ")
    assert " tokens take " in told
    decisions = core.info()["decisions"]
    assert isinstance(decisions, list)
    assert [line for line in decisions if line.startswith("two-batch overlap")] == [told]


@pytest.mark.parametrize("flags", [{"tp": 1, **TBO}, {"tp": 2}, {"tp": 2, **TBO, "tbo_min_tokens": 7}])
def test_nothing_is_measured_where_it_was_not_asked_for(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "measure", None)
    core = started("qwen3", **flags)
    core.runner.close()
    assert core.planner.config.split_from == flags.get("tbo_min_tokens", 0)
    assert "halves" not in core.stages.seconds


@pytest.mark.parametrize("at", [0, 1])
def test_a_rank_of_threads_that_runs_out_of_memory_switches_it_off(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearse = Trials.rehearse

    def lacking(self: Trials, step: Step) -> None:
        rehearse(self, step)
        if self._comm.rank == at:
            raise torch.OutOfMemoryError(LACKING)

    monkeypatch.setattr(Trials, "rehearse", lacking)
    run = serve(model("hybrid"), varied("varied"), dtype="float64", tp=2, **TBO)
    assert run.ends() == alone("hybrid", "varied").ends()
    assert not run.halved


def test_a_rank_that_fails_otherwise_ends_the_start_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trials, step: Step) -> None:
        raise ValueError("out of cheese")

    monkeypatch.setattr(Trials, "rehearse", broken)
    with pytest.raises(PeerError, match=r"dry step of 512 tokens \(rehearse\) failed: out of cheese"):
        started("qwen3", **TBO, tp=2)


@pytest.mark.parametrize(("name", "collectives"), [("abacus-hybrid", "shared"), ("abacus-mla", "gloo")])
def test_ranks_that_are_processes_measure_and_answer_as_one(
    name: str, collectives: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = requests(name)
    with caplog.at_level(logging.INFO, logger="tessera"):
        run = serve(packaged(name), asked, **flags_of(name, tp=2, **SHORT, collectives=collectives))
    assert run.ends() == serve(packaged(name), asked, **BASE).ends()
    (told,) = [r.getMessage() for r in caplog.records if r.name == cores.__name__]
    assert " tokens take " in told


WITHOUT = f"""
if rank == 1:
    import torch
    from tessera.run.trials import Trials
    def rehearse(self, step):
        raise torch.OutOfMemoryError({LACKING!r})
    Trials.rehearse = rehearse
"""


def test_a_process_without_memory_leaves_nobody_waiting(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inject(WITHOUT, tmp_path, monkeypatch)
    name = "abacus-mla"
    with caplog.at_level(logging.INFO, logger="tessera"):
        run = serve(packaged(name), requests(name)[:2], **flags_of(name, tp=2, **TBO))
    assert len(run.answers) == 2
    (told,) = [r.getMessage() for r in caplog.records if r.name == cores.__name__]
    assert told.startswith(
        "two-batch overlap: off (measured: 512 tokens cannot be tried: rank 1: Tried to allocate 2.00"
    )
