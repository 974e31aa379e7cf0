"""The tests of invariance can fail: each fault put back here changes answers, with all checks off."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from tessera.core.messages import Abort, Submit
from tessera.plan.change import ChangeBuilder
from tessera.plan.pages import PagePool
from tessera.plan.step import NO_INTS, Ints, Step
from tessera.run import build
from tessera.run.host import Download
from tessera.run.pools import Pools
from tessera.run.runner import Launched, Runner
from tessera.run.sampler import Sampler
from tessera.run.table import RowTable
from test_invariance import LAYOUTS, SAMPLED, alone, model, prompts, requests
from tiny import Run, serve

Patch = pytest.MonkeyPatch


class LateFuture(Future[Download]):
    """Does its work only when somebody asks, after all work that was submitted before it."""

    def __init__(self, queue: list[LateFuture], work: Callable[[], Download]) -> None:
        super().__init__()
        self._queue, self._work = queue, work

    def result(self, timeout: float | None = None) -> Download:
        while not self.done():
            first = self._queue.pop(0)
            first.set_result(first._work())
        return super().result(timeout)


class Late:
    """An executor whose work runs as late as it may: what is not in order shows."""

    def __init__(self) -> None:
        self._late: list[LateFuture] = []

    def submit(self, work: Callable[[], Any]) -> Any:
        self._late.append(LateFuture(self._late, work))
        return self._late[-1]

    def close(self) -> None:
        assert not self._late, "work that nobody asked for"


def run(name: str, layout: str) -> Run:
    return serve(model(name), requests("varied"), debug_checks=False, dtype="float64", **LAYOUTS[layout])


def forks() -> dict[tuple[str, int], tuple[list[int], str | None]]:
    """Choices that end one after the other, while others arrive."""
    params = msgspec.structs.replace(SAMPLED, seed=5, max_new_tokens=30, stop_token_ids=tuple(range(2, 8)))
    asked = [Submit("f", prompts()[4], params, n=4), *requests("varied")]
    flags = {"max_running_requests": 16, "max_total_tokens": 304, "page_size": 8, "disable_radix_cache": True}
    return serve(model("hybrid"), asked, debug_checks=False, dtype="float64", **flags).ends()


@pytest.mark.parametrize("layout", ["overlapped", "tiny pool", "two rows", "prefix cache, one at a time"])
@pytest.mark.parametrize("name", ["qwen3", "hybrid"])
def test_work_that_runs_as_late_as_it_may_changes_nothing(name: str, layout: str, monkeypatch: Patch) -> None:
    monkeypatch.setattr(build, "Worker", Late)
    assert run(name, layout).ends() == alone(name, "varied").ends()


def test_a_slot_that_keeps_the_state_of_its_last_sequence(monkeypatch: Patch) -> None:
    apply = Pools.apply
    monkeypatch.setattr(Pools, "apply", lambda self, change: apply(self, replace(change, zero_slots=NO_INTS)))
    assert run("hybrid", "two rows").ends() != alone("hybrid", "varied").ends()


def test_a_slot_zeroed_before_the_overshoot_step_has_run(monkeypatch: Patch) -> None:
    launch, apply = Runner.launch, Pools.apply

    def early(self: Runner, step: Step) -> Launched:
        apply(self.pools, step.parts[0].change)
        return launch(self, step)

    monkeypatch.setattr(build, "Worker", Late)
    monkeypatch.setattr(Runner, "launch", early)
    monkeypatch.setattr(Pools, "apply", lambda self, change: None)
    assert run("hybrid", "two rows").ends() != alone("hybrid", "varied").ends()


@pytest.mark.parametrize("field", ["seeds", "positions"])
def test_noise_that_depends_on_the_batch(field: str, monkeypatch: Patch) -> None:
    drawing = Sampler._drawing

    def by_row(self: Sampler, draws: Any, plan: Any) -> Any:
        made = drawing(self, draws, plan)
        return made and replace(made, **{field: draws.rows[made.rows].long()})

    monkeypatch.setattr(Sampler, "_drawing", by_row)
    one = serve(model("qwen3"), requests("varied"), together=False, dtype="float64", disable_radix_cache=True).ends()
    assert run("qwen3", "all at once").ends() != one


def test_what_was_drawn_before_a_preemption_is_forgotten(monkeypatch: Patch) -> None:
    enter = RowTable._enter

    def forgetful(self: RowTable, entered: Any) -> Any:
        known = enter(self, entered)
        tokens = np.where(np.arange(len(known.tokens)) < entered.num_prompt, known.tokens, 2).astype(np.int32)
        return replace(known, tokens=tokens)

    monkeypatch.setattr(RowTable, "_enter", forgetful)
    assert run("qwen3", "tiny pool").ends() != alone("qwen3", "varied").ends()


@pytest.mark.parametrize("kept", ["pages", "slots"])
def test_a_fork_that_copies_only_half_of_its_state(kept: str, monkeypatch: Patch) -> None:
    copy, expected = ChangeBuilder.copy, forks()

    def half(self: ChangeBuilder, pages: tuple[int, int] | None, slots: tuple[int, int] | None) -> None:
        copy(self, pages if kept == "pages" else None, slots if kept == "slots" else None)

    monkeypatch.setattr(ChangeBuilder, "copy", half)
    assert forks() != expected


def test_pages_that_others_hold_are_free_when_one_holder_ends(monkeypatch: Patch) -> None:
    expected = forks()

    def drop(self: PagePool, pages: Ints, distinct: bool = True) -> None:
        held = np.unique(pages[self.refs[pages] > 0])
        self.refs[held] = 0
        self._push(held)

    monkeypatch.setattr(PagePool, "drop", drop)
    assert forks() != expected


def test_an_aborted_request_that_goes_on_talking(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Runner, "drop", lambda self, request_id, choice: None)

    def abort(core: Any, output: Any) -> None:
        if output.finish is None:
            core.post(Abort(output.request_id))

    with pytest.raises(AssertionError, match="after the end"):
        serve(model("qwen3"), requests("greedy"), also=abort)
