"""The layout of the ranks never changes the answer, and a rank that fails takes nobody's deadline to be heard of."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from run.test_loop import LONG, Engine, prompt
from tessera.comm.waits import interleave
from tessera.core.messages import SamplingParams, Submit
from tessera.run import build
from tessera.run.group import Group
from test_invariance import SAMPLED, alone, model, prompts, requests
from tiny import Run, serve

MIXED = {"enable_mixed_chunk": True, "chunked_prefill_size": 9}
TINY_POOL = {"max_total_tokens": 96, "disable_radix_cache": True}

DP: dict[str, Any] = {"enable_dp_attention": True}
TBO: dict[str, Any] = {"enable_two_batch_overlap": True, "tbo_min_tokens": 2}
# Sizes for every case: heads cut, KV heads held by several ranks, experts cut and spread, groups of the attention.
MESHES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"tp": 2}),
    ("qwen3", {"tp": 4, **MIXED}),
    ("qwen3", {"tp": 2, **TINY_POOL}),
    ("hybrid", {"tp": 2}),
    ("hybrid", {"tp": 4, **MIXED}),
    ("hybrid", {"tp": 2, "ep": 2, **TINY_POOL}),
    ("mla", {"tp": 2, "disable_overlap_schedule": True}),
    ("mla", {"tp": 4, "ep": 2, **MIXED}),
    ("qwen3", {"tp": 2, "dp": 2, **DP}),
    ("qwen3", {"tp": 4, "dp": 2, **DP, **MIXED}),
    ("hybrid", {"tp": 2, "dp": 2, "ep": 2, **DP, **MIXED}),
    ("hybrid", {"tp": 4, "dp": 2, "ep": 2, "enable_dp_lm_head": True, **DP, **TINY_POOL}),
    ("mla", {"tp": 4, "dp": 4, "ep": 4, "moe_dense_tp_size": 1, **DP}),
    ("qwen3", {"tp": 2, **TBO}),
    ("hybrid", {"tp": 2, **MIXED, **TBO, "tbo_token_distribution_threshold": 0.0}),
    ("hybrid", {"tp": 4, "dp": 2, "ep": 2, **DP, **TBO, "enable_mixed_chunk": True}),
    ("mla", {"tp": 2, "dp": 2, "ep": 2, **DP, **MIXED, **TBO}),
    ("mla", {"tp": 4, "dp": 2, **DP, **TINY_POOL, **TBO}),
]


@pytest.mark.parametrize(("name", "flags"), MESHES)
def test_ranks_together_answer_as_one(name: str, flags: dict[str, Any]) -> None:
    run = serve(model(name), requests("varied"), dtype="float64", **flags)
    assert run.ends() == alone(name, "varied").ends()
    assert {r.dp_rank for r in run.reports if r.num_new_token} == set(range(flags.get("dp", 1)))


def run_cut_inside(name: str) -> Run:
    """One prompt at a time on two ranks: prompts of 65 tokens and more are cut at 64, inside their one sequence."""
    return serve(model(name), requests("varied"), together=False, dtype="float64", tp=2, **TBO)


@pytest.mark.parametrize("name", ["qwen3", "hybrid", "mla"])
def test_a_sequence_cut_inside_runs_as_one(name: str) -> None:
    assert run_cut_inside(name).ends() == alone(name, "varied").ends()


@pytest.mark.parametrize("name", ["qwen3", "hybrid", "mla"])
def test_a_second_half_that_runs_ahead_of_the_first_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "interleave", lambda runs: interleave(runs[::-1])[::-1])
    assert run_cut_inside(name).ends() != alone(name, "varied").ends()


def test_a_group_without_requests_takes_part_and_reports_that_it_idles() -> None:
    run = serve(model("hybrid"), requests("varied"), together=False, dtype="float64", tp=2, dp=2, **DP)
    assert run.ends() == alone("hybrid", "varied").ends()
    labels = {(r.dp_rank, r.label) for r in run.reports}
    assert labels >= {(0, "IDLE"), (1, "IDLE"), (0, "EXTEND"), (1, "EXTEND"), (0, "DECODE"), (1, "DECODE")}
    output = sum(len(answer.tokens) for answer in run.answers.values())
    assert sum(r.num_output_token for r in run.reports) == output
    steps = {r.index for r in run.reports if r.seconds}
    busiest = [r for r in run.reports if r.seconds and r.busiest]
    assert sorted(r.index for r in busiest) == sorted(steps), "one rank stands for each step"
    assert "IDLE" not in {r.label for r in busiest}


def test_prompts_are_scored_and_choices_forked_on_all_ranks() -> None:
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=2)
    asked = [Submit(f"s{i}", text, score) for i, text in enumerate(prompts())]
    asked.append(Submit("f", prompts()[4], msgspec.structs.replace(SAMPLED, seed=5, logprobs=1), n=3))
    one = serve(model("hybrid"), asked, dtype="float64")
    two = serve(model("hybrid"), asked, dtype="float64", tp=2, chunked_prefill_size=11)
    assert two.tokens() == one.tokens()
    for key, answer in one.answers.items():
        for kind in ("logprobs", "prompt_logprobs"):
            expected, found = getattr(answer, kind) or [], getattr(two.answers[key], kind) or []
            assert [e.top_ids for e in found] == [e.top_ids for e in expected]
            assert [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_at_once_and_says_why(rank: int) -> None:
    engine = Engine(tp=2)
    group = engine.core.runner
    assert isinstance(group, Group)
    forward, calls = group.runners[rank].model.forward, iter(range(3))

    def broken(*args: Any) -> Any:
        if next(calls) == 2:
            raise ValueError(f"rank {rank} is out of cheese")
        return forward(*args)

    group.runners[rank].model.forward = broken  # type: ignore[method-assign]
    for i in range(4):
        engine.core.post(Submit(f"r{i}", prompt(i), LONG))
    began = time.monotonic()
    with engine:
        assert {output.finish for output in engine.ended().values()} == {"error"}
        assert f"rank {rank} is out of cheese" in (engine.fatal() or "").error  # type: ignore[union-attr]
    assert time.monotonic() - began < 10
