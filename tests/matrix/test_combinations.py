"""Combinations that break elsewhere, as rows of `docs/combinations.md`: those that need no test of their own place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.test_config import decided
from core.test_config_mesh import meshed, refused
from house.source import ROOT
from matrix.serving import RANDOM, model_of
from tessera.core.messages import SamplingParams, Submit
from tessera.plan import halves
from tessera.plan.halves import cut
from tessera.plan.step import Part
from tiny import Run, serve

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True, logprobs=0)
DP: dict[str, Any] = {"tp": 2, "dp": 2, "enable_dp_attention": True}
MIXED: dict[str, Any] = {"enable_mixed_chunk": True, "chunked_prefill_size": 7}
HALVES: dict[str, Any] = {"enable_two_batch_overlap": True, "tbo_min_tokens": 2}
HYBRID = "abacus-hybrid"


def asked(*lengths: int, **more: Any) -> list[Submit]:
    """Greedy requests whose prompts have these lengths."""
    return [Submit(f"r{i}", [2 + (7 * i + j) % 90 for j in range(n)], GREEDY, **more) for i, n in enumerate(lengths)]


def same(requests: list[Submit], name: str = RANDOM, **flags: Any) -> Run:
    """Serves requests that come while others decode, and compares with one rank that has them one after the other."""
    arrivals = [3 * i for i in range(len(requests))]
    run = serve(model_of(name), requests, arrivals=arrivals, dtype="float64", **flags)
    anywhere = [msgspec.structs.replace(request, dp_rank=None) for request in requests]
    alone = serve(model_of(name), anywhere, together=False, dtype="float64")
    assert run.ends() == alone.ends()
    for key, answer in run.answers.items():
        found, expected = ([e.logprob for e in one.logprobs] for one in (answer, alone.answers[key]))
        assert found == pytest.approx(expected, abs=1e-9)
    return run


def labels(run: Run, halved: bool = False) -> set[str]:
    """Kinds of parts; `halved`: of steps that ran as two halves."""
    return {r.label for r in run.reports if r.seconds and (not halved or r.index in run.halved)}


def test_row_1_dp_attention_and_mixed_chunk() -> None:
    assert "MIXED" in labels(same(asked(9, 30, 25, 40), **DP, **MIXED))


def test_row_2_two_batch_overlap_and_mixed_chunk() -> None:
    assert "MIXED" in labels(same(asked(9, 30, 25, 40), **DP, **MIXED, **HALVES), halved=True)


def test_halves_on_either_side_of_the_size_up_to_which_exchanges_are_padded() -> None:
    """Known fault: each half chose for itself, so one had fewer stages and overtook the one whose keys it reads."""
    travel = {"ep": 2, "moe_a2a_backend": "all_to_all", "moe_a2a_padded_tokens": 5}
    assert "MIXED" in labels(same(asked(9, 30, 25, 40), **DP, **MIXED, **HALVES, **travel), halved=True)


def test_a_rule_that_does_not_know_mixed_steps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash of other engines: where to split is not defined for the kind of step that prompts and decodes make."""

    def knows_pure_steps(part: Part, share: float, grain: int) -> int:
        ones = part.lengths == 1
        assert ones.all() or not ones.any(), "no split index for MIXED"
        return cut(part, share, grain)

    monkeypatch.setattr(halves, "cut", knows_pure_steps)
    with pytest.raises(AssertionError, match="no split index for MIXED"):
        same(asked(9, 30, 25, 40), **DP, **MIXED, **HALVES)


@pytest.mark.parametrize("mesh", [{"tp": 2}, DP], ids=str)
def test_row_3_two_batch_overlap_and_hybrid_layers(mesh: dict[str, Any]) -> None:
    assert labels(same(asked(9, 30, 25), HYBRID, **mesh, **MIXED, **HALVES), halved=True) >= {"EXTEND", "MIXED"}


@pytest.mark.parametrize("name", [RANDOM, HYBRID])
def test_row_4_two_batch_overlap_of_one_row_of_one_token(name: str) -> None:
    """One rank has a single token in steps that are halved because of the other, so one of its halves is empty."""
    decodes, prompts = asked(1, dp_rank=1), asked(40, 23, dp_rank=0)
    requests = [*decodes, *(msgspec.structs.replace(p, request_id=f"p{i}") for i, p in enumerate(prompts))]
    run = same(requests, name, **DP, **HALVES, chunked_prefill_size=7)
    lonely = [r for r in run.reports if r.index in run.halved and r.dp_rank == 1 and r.seconds]
    assert any((r.label, r.num_running) == ("DECODE", 1) for r in lonely)
    assert any((r.label, r.num_running) == ("IDLE", 0) for r in lonely)


@pytest.mark.parametrize("tp", [2, 4])
def test_row_5_two_batch_overlap_attention_tp_and_odd_lengths(tp: int) -> None:
    run = same(asked(1, 3, 17, 29), tp=tp, tbo_token_distribution_threshold=0.5, **MIXED, **HALVES)
    assert run.halved


def test_row_10_logprobs_in_mixed_steps() -> None:
    """The prompt that is scored is computed beside one that decodes."""
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
    requests = [*asked(9, 5), Submit("scored", [2 + i % 90 for i in range(30)], score)]
    run = same(requests, tp=2, **MIXED)
    alone = serve(model_of(RANDOM), requests[2:], dtype="float64")
    found, expected = ([e.logprob for e in one.answers["scored", 0].prompt_logprobs or []] for one in (run, alone))
    assert found[1:] == pytest.approx(expected[1:], abs=1e-9)
    assert "MIXED" in labels(run)


@pytest.mark.parametrize("name", [RANDOM, HYBRID])
@pytest.mark.parametrize("mixed", [False, True])
def test_row_13_a_last_chunk_of_one_token(name: str, mixed: bool) -> None:
    run = same(asked(8, 15, 22, 1), name, **DP, enable_mixed_chunk=mixed, chunked_prefill_size=7)
    assert sum(r.num_new_token for r in run.reports) == 8 + 15 + 22 + 1


def test_row_32_dp_attention_with_one_group() -> None:
    (text,) = refused(tp_size=2, enable_dp_attention=True)
    assert text.startswith("--enable-dp-attention with --dp-size 1: one group is not data parallel. Give --dp-size")


def test_row_33_the_chunk_is_that_of_each_rank_and_step_and_it_is_told() -> None:
    found = decided(meshed(tp=2, dp=2, enable_dp_attention=True, chunked_prefill_size=7), "--chunked-prefill-size")
    assert "per data-parallel rank and step" in str(found)
    run = serve(model_of(RANDOM), asked(30, 30, 30), dtype="float64", **DP, **MIXED)
    steps: dict[int, list[int]] = {}
    for report in run.reports:
        steps.setdefault(report.index, []).append(report.num_new_token)
    assert max(sum(tokens) for tokens in steps.values()) == 14, "both ranks have a whole chunk"
    assert max(max(tokens) for tokens in steps.values()) == 7


def test_row_34_dense_layers_on_some_of_the_ranks() -> None:
    same(asked(9, 30), tp=4, moe_dense_tp_size=2)
    same(asked(9, 30), tp=4, dp=2, enable_dp_attention=True, moe_dense_tp_size=2)
    (text,) = refused(tp_size=4, moe_dense_tp_size=3)
    assert "Use --moe-dense-tp-size 1, 2 or 4." in text


@pytest.mark.parametrize("travel", ["none", "all_to_all"])
def test_row_35_experts_on_some_groups_of_the_ranks(travel: str) -> None:
    same(asked(9, 30), tp=4, ep=2, moe_a2a_backend=travel)


TABLE = ROOT / "docs" / "combinations.md"
TEST = re.compile(r"`(tests/\S+?\.py)::(\w+)`")


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    rows = [line.split("|")[1:-1] for line in TABLE.read_text().splitlines() if re.match(r"\| \d", line)]
    numbers = [int(row[0]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert {*range(1, 26), *range(31, 36)} <= set(numbers)
    for number, _, where in rows:
        named = TEST.findall(where)
        assert named, f"row {number} names no test"
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"row {number}: there is no {test} in {file}"


def test_every_row_that_is_tested_here_is_in_the_table() -> None:
    here = set(re.findall(r"def (test_row_\w+)\(", Path(__file__).read_text()))
    assert here == {test for _, test in TEST.findall(TABLE.read_text()) if test.startswith("test_row_")}
