"""The layout never changes the answer: every pair of values of two axes of the matrix, by ranks that are threads.

`make matrix` runs every three, and every layout; the points, and what is checked of each, are the same.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from matrix import serving
from matrix.__main__ import Stage, work
from matrix.points import ACCEPTED, AXES, POINTS, REFUSED, Point, by_processes, cover, covering, features, layouts
from matrix.results import Results, counted
from matrix.serving import RANDOM, alone, judge
from models.test_layout_faults import modulo
from plan.test_faults import around
from tessera.core.layout import Section
from tiny import PATIENCE_S


@pytest.mark.parametrize("point", covering(ACCEPTED, 2), ids=str)
def test_every_pair_of_settings_answers_as_one_rank(point: Point) -> None:
    verdict = judge(point)
    assert verdict.outcome == "passed", verdict.why


@pytest.mark.parametrize("point", features(), ids=str)
def test_features_that_meet_in_one_layout_answer_as_one_rank(point: Point) -> None:
    """Known fault: three of them at once gave wrong tokens (`docs/combinations.md`, 37), any two did not."""
    verdict = judge(point, "short")
    assert verdict.outcome == "passed", verdict.why


def test_groups_idle_prefill_decode_and_mix_in_the_same_step() -> None:
    point = Point(RANDOM, 1, 4, 4, "1", True, False, True, False, 7)
    verdict = judge(point)
    assert verdict.outcome == "passed", verdict.why
    assert frozenset({"IDLE", "EXTEND", "DECODE", "MIXED"}) in verdict.together


def test_ranks_that_are_processes_are_judged_alike() -> None:
    verdict = judge(by_processes()[0], "gloo")
    assert verdict.outcome == "passed", verdict.why


def test_what_cannot_be_is_refused_by_both_flags() -> None:
    for point in covering(REFUSED, 3):
        verdict = judge(point)
        assert verdict.outcome == "refused", f"{point}: {verdict.why}"


def test_the_covers_cover() -> None:
    """And the matrix is whole: all values of all axes, three at a time."""
    assert len(POINTS) == len(ACCEPTED) + len(REFUSED)
    assert {(p.model, *p.layout) for p in layouts()} == {(p.model, *p.layout) for p in ACCEPTED}
    values = [tuple(getattr(p, axis) for axis in AXES) for p in ACCEPTED]
    for strength in (1, 2):
        few = [values[i] for i in cover(values, strength)]
        for columns in combinations(range(len(AXES)), strength):
            assert {tuple(v[c] for c in columns) for v in few} == {tuple(v[c] for c in columns) for v in values}


HEADS = Point(RANDOM, 4, 1, 2, "tp", False, False, True, False, 64)


def test_a_wrong_layout_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas of KV heads dealt out in turn, not side by side."""
    assert judge(HEADS).outcome == "passed"
    around(monkeypatch, Section, "held", modulo)
    verdict = judge(HEADS)
    assert verdict.outcome == "failed"
    assert "other tokens than one rank's" in verdict.why


def test_time_that_ran_out_is_told_as_such_counted_apart_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known fault: "other tokens than one rank's", of requests that were cut off on a busy machine."""
    plan, path = [Stage("one", [HEADS])], tmp_path / "lines"
    alone.cache_clear()
    monkeypatch.setitem(PATIENCE_S, "cpu", 0.0)
    work(Results(path, "here"), plan, float("inf"))
    (line,) = Results(path, "here").lines([HEADS], "threads")
    assert line["outcome"] == "late"
    assert "one rank's answers" in line["why"]
    monkeypatch.undo()
    assert judge(HEADS).outcome == "passed"
    monkeypatch.setitem(PATIENCE_S, "cpu", 0.0)
    results = Results(path, "here")
    work(results, plan, float("inf"))
    assert results.wrong([HEADS], "threads") == [f"LATE {HEADS} (threads)"]
    assert "time ran out for [('r" in results.of(HEADS, "threads")["why"]  # type: ignore[index]
    assert counted(results.lines([HEADS], "threads"), 1)[:6] == [1, 0, 0, 0, 1, 0]
    around(monkeypatch, Section, "held", modulo)
    assert judge(HEADS).outcome == "failed", "what came in time was wrong"
    monkeypatch.undo()
    work(Results(path, "here"), plan, float("inf"))
    assert Results(path, "here").wrong([HEADS], "threads") == []


def test_logprobs_are_compared_as_closely_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < judge(HEADS).worst <= 1e-5
    monkeypatch.setattr(serving, "TOLERANCE", 0.0)
    assert "a logprob is" in judge(HEADS).why


def test_a_refusal_that_is_missing_or_names_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(HEADS, lm_head=True)
    assert judge(bad).outcome == "refused"
    expected: list[tuple[str, str]] = [("--enable-dp-lm-head", "--ep-size")]
    monkeypatch.setattr(serving, "refusals", lambda point: expected)
    assert [judge(point).outcome for point in (bad, HEADS)] == ["failed", "failed"]
    expected.clear()
    assert "expected: to be served" in judge(bad).why
