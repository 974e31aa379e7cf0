"""Promise: whatever two layouts hand a prompt over, the answers are those of one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matrix import handover
from matrix.handover import LAYOUTS, MODELS, WAY, Pair, Side, judge, stages, work
from matrix.results import Results
from tessera.transfer.copies import CopyPlan

LAID_OUT = [
    Pair("abacus-mla", (4, 1), (1, 2)),
    Pair("abacus-hybrid", (2, 2), (1, 4)),
    Pair("qwen3", (1, 4), (4, 1)),
]


@pytest.mark.parametrize("pair", LAID_OUT, ids=str)
def test_pairs_of_each_model_answer_as_one_rank(pair: Pair) -> None:
    side = Side(pair.model, pair.prefill)
    try:
        assert side.wrong(pair.decode) == ""
    finally:
        side.close()


def test_every_pair_is_in_one_stage() -> None:
    pairs = [pair for _, some in stages() for pair in some]
    assert len(pairs) == len(set(pairs)) == len(MODELS) * len(LAYOUTS) ** 2


def test_a_wrong_copy_is_seen_and_a_pair_that_failed_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [("one", [Pair("qwen3", (1, 1), (1, 1)), Pair("qwen3", (1, 1), (2, 1))])]
    results = Results(tmp_path / "lines", "here")
    paged = CopyPlan.paged
    monkeypatch.setattr(
        CopyPlan, "paged", lambda self, a, b, pages, to: paged(self, a, b, pages, np.roll(to, 1))
    )  # pages of a chunk in each other's places
    work(results, plan, float("inf"))
    assert [line["outcome"] for line in results.lines(plan[0][1], WAY)] == ["failed", "failed"]
    monkeypatch.undo()
    again = Results(tmp_path / "lines", "here")
    work(again, plan, float("inf"))
    assert [line["outcome"] for line in again.lines(plan[0][1], WAY)] == ["passed", "passed"]
    monkeypatch.setattr(handover, "judge", lambda *_: ("failed", "it was run again"))
    work(Results(tmp_path / "lines", "here"), plan, float("inf"))
    assert len((tmp_path / "lines").read_text().splitlines()) == 4, "what has passed is not run again"
    work(Results(tmp_path / "lines", "elsewhere"), plan, 0.0)  # no time is left
    assert len((tmp_path / "lines").read_text().splitlines()) == 4


def test_a_pair_that_breaks_has_failed_and_the_next_one_has_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side("qwen3", (1, 1))
    monkeypatch.setattr(handover, "one", lambda *_: 1 // 0)
    outcome, why = judge(side, (1, 1))
    assert outcome == "failed"
    assert "ZeroDivisionError" in why
    monkeypatch.undo()
    monkeypatch.setattr(handover, "WAIT_S", 0.0)
    outcome, why = judge(side, (1, 1))
    assert outcome == "late"
    assert "it takes longer than 0 s" in why
    monkeypatch.undo()
    try:
        assert judge(side, (1, 1)) == ("passed", "")
    finally:
        side.close()
