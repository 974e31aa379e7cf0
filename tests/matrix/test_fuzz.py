"""Promise: whatever is asked, beside whomever, of whatever layout, the answer is that of one rank asked alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from matrix.drawn import Case, cases
from matrix.fuzz import NEVER, alone, wrong
from matrix.whole import Call, Flags
from tessera.plan import request
from tessera.run import sampler
from tessera.run.rowparams import RowParams


@settings(max_examples=max(settings().max_examples // 16, 1), suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_request_on_any_layout_answers_as_one_rank_asked_alone(case: Case) -> None:
    """A few examples; `make test-fuzz` tries many."""
    assert wrong(case) == []


PROMPT = "The layout never changes the answer."
VARIED = {"text": PROMPT, "sampling_params": {"max_new_tokens": 6, "temperature": 0, "presence_penalty": 2}}
CHOICES = {"text": PROMPT, "sampling_params": {"n": 3, "seed": 5, "max_new_tokens": 4}}
PATIENT = {"text": PROMPT, "sampling_params": {"max_new_tokens": 6, "min_new_tokens": 4, "logit_bias": {"1": 100}}}


def in_turn(*bodies: dict[str, Any], servers: Sequence[Flags] = ({},)) -> Case:
    """Calls of `/generate`, one after the other."""
    flags = {"page_size": 4, "max_total_tokens": 512, "max_running_requests": 4}
    return Case("gqa", {}, [{**flags, **own} for own in servers], [Call("/generate", body, NEVER) for body in bodies])


NOTE = RowParams.note
FAULTS: dict[str, tuple[Any, str, Callable[..., Any], Case]] = {
    "penalties forget the token that came with the prompt": (
        RowParams,
        "note",
        lambda self, enters: NOTE(self, [msgspec.structs.replace(e, num_prompt=len(e.tokens)) for e in enters]),
        in_turn(VARIED, servers=({}, {"tp": 2})),
    ),
    "all choices draw with the seed of the first": (
        request,
        "choice_seed",
        lambda seed, choice: seed,
        in_turn(CHOICES, servers=({}, {"tp": 2})),
    ),
    "the first token, which prefill draws, may end the answer before its time": (
        sampler,
        "_banned",
        lambda *_: None,
        in_turn(PATIENT, servers=({"tp": 2}, {})),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, mutant, case = FAULTS[fault]
    expected = alone(case)
    assert wrong(case, expected) == []
    monkeypatch.setattr(where, name, mutant)
    assert wrong(case, expected)


def test_every_choice_has_the_logprobs_of_the_prompt_wherever_it_was_computed() -> None:
    """Also where they come to decode before any token, and where rows are so few that choices wait for one."""
    body = {**CHOICES, "return_logprob": True, "logprob_start_len": 3}
    for servers in ({},), ({"max_running_requests": 1},), ({}, {"tp": 2}):
        case = in_turn(body, {**body, "stream": True}, servers=servers)
        expected = alone(case)
        assert wrong(case, expected) == []
        for _, answers in expected:
            scores = [answer["meta_info"]["input_token_logprobs"] for answer in answers]
            assert len(scores[0]) == len(PROMPT) - 3
            assert scores == [scores[0]] * 3
