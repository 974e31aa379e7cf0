"""The layout of the work never changes the answer: batching, chunks, mixing, preemption, cached prefixes, overlap, forks."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from tessera.core.messages import SamplingParams, Submit
from tiny import TINY, Run, TinyModel, serve, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.8, top_p=0.95, top_k=40, max_new_tokens=12, repetition_penalty=1.1, ignore_eos=True
)
PLAIN: dict[str, Any] = {"disable_overlap_schedule": True, "disable_radix_cache": True}

# How the work is laid out: flags beside those of `tiny.FLAGS`, and whether the requests come together.
LAYOUTS: dict[str, dict[str, Any]] = {
    "all at once": {**PLAIN},
    "overlapped": {"disable_radix_cache": True},
    "overlapped, one at a time": {"together": False, "disable_radix_cache": True},
    "chunk 3": {"chunked_prefill_size": 3},
    "chunk 64": {"chunked_prefill_size": 64},
    "mixed": {"enable_mixed_chunk": True, "chunked_prefill_size": 16},
    "mixed, chunk 20, plain loop": {**PLAIN, "enable_mixed_chunk": True, "chunked_prefill_size": 20},
    "tiny pool": {"max_total_tokens": 96, "disable_radix_cache": True},
    "tiny pool, mixed, cached": {"max_total_tokens": 96, "enable_mixed_chunk": True, "chunked_prefill_size": 17},
    "prefix cache, one at a time": {"together": False},
    "page 16": {"page_size": 16},
    "page 1": {"page_size": 1},
    "two rows": {"max_running_requests": 2},
}


def prompts() -> list[list[int]]:
    """Ten prompts of 1 to 70 tokens; some begin alike."""
    rng = np.random.default_rng(7)
    draw = lambda n: rng.integers(2, 96, n).tolist()  # noqa: E731
    shared = draw(33)
    return [
        draw(70),
        draw(1),
        shared + draw(9),
        draw(5),
        shared + draw(20),
        shared,
        draw(2),
        draw(41),
        shared,
        draw(64),
    ]


def requests(params: SamplingParams) -> list[Submit]:
    """A request per prompt, each with a seed of its own."""
    return [
        Submit(f"r{i}", prompt, msgspec.structs.replace(params, seed=100 + i)) for i, prompt in enumerate(prompts())
    ]


@cache
def model(name: str) -> TinyModel:
    return tiny_model(name)


@cache
def alone(name: str, params: str, dtype: str) -> Run:
    """Every request alone, in the plain loop: what all layouts must give."""
    chosen = {"greedy": GREEDY, "sampled": SAMPLED}[params]
    return serve(model(name), requests(chosen), together=False, dtype=dtype, **PLAIN)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("params", ["greedy", "sampled"])
@pytest.mark.parametrize("name", TINY)
def test_tokens_are_those_of_each_request_alone(name: str, params: str, layout: str) -> None:
    expected = alone(name, params, "float64")
    chosen = {"greedy": GREEDY, "sampled": SAMPLED}[params]
    run = serve(model(name), requests(chosen), dtype="float64", **LAYOUTS[layout])
    assert run.tokens() == expected.tokens()
    assert len({tuple(t) for t in run.tokens().values()}) > 5, "the answers must differ to prove anything"


@pytest.mark.parametrize("name", TINY)
def test_the_layouts_do_what_they_are_named_for(name: str) -> None:
    cached = name != "hybrid"

    def run(layout: str) -> Run:
        return serve(model(name), requests(GREEDY), dtype="float64", **LAYOUTS[layout])

    tiny, mixed, prefix = run("tiny pool"), run("mixed"), run("prefix cache, one at a time")
    assert sum(r.num_preempted for r in tiny.reports) > 0
    assert any(r.label == "MIXED" and r.num_running > r.num_new_seq for r in mixed.reports)
    assert (sum(r.num_cached_token for r in prefix.reports) > 0) == cached
    assert (prefix.answers["r8", 0].num_cached == 32) == cached
    chunks = [r for r in run("chunk 3").reports if r.label == "EXTEND"]
    assert max(r.num_new_token for r in chunks) == 3


@pytest.mark.parametrize("name", TINY)
def test_teacher_forced_logprobs_agree_in_float32(name: str) -> None:
    answers = alone(name, "greedy", "float32").tokens()
    texts = [prompt + answers[f"r{i}", 0] for i, prompt in enumerate(prompts())]
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=3)
    forced = [Submit(f"r{i}", text, score) for i, text in enumerate(texts)]
    expected = serve(model(name), forced, together=False, dtype="float32", **PLAIN)
    for layout, flags in LAYOUTS.items():
        run = serve(model(name), forced, dtype="float32", **flags)
        for key, answer in run.answers.items():
            own, wanted = (_own(a.prompt_logprobs) for a in (answer, expected.answers[key]))
            assert len(own) == len(texts[int(key[0][1:])]) - 1
            np.testing.assert_allclose(own, wanted, atol=1e-4, err_msg=f"{layout}, {key}")


@pytest.mark.parametrize("name", TINY)
def test_logprobs_of_drawn_tokens_are_those_of_scoring_them(name: str) -> None:
    asked = msgspec.structs.replace(SAMPLED, logprobs=2, prompt_logprobs=0, logprob_start=1)
    run = serve(model(name), requests(asked), dtype="float32", enable_mixed_chunk=True, chunked_prefill_size=9)
    score = SamplingParams(max_new_tokens=0, prompt_logprobs=0, logprob_start=1)
    texts = [prompt + run.answers[f"r{i}", 0].tokens for i, prompt in enumerate(prompts())]
    scored = serve(model(name), [Submit(f"r{i}", text, score) for i, text in enumerate(texts)], dtype="float32")
    for key, answer in run.answers.items():
        together = _own(answer.prompt_logprobs) + _own(answer.logprobs)
        np.testing.assert_allclose(together, _own(scored.answers[key].prompt_logprobs), atol=1e-4)


def _own(entries: Any) -> list[float]:
    return [entry.logprob for entry in entries or [] if entry.logprob is not None]


@pytest.mark.parametrize("flags", [{}, {"enable_mixed_chunk": True, "chunked_prefill_size": 7}, {"page_size": 1}])
@pytest.mark.parametrize("name", TINY)
def test_forked_choices_draw_what_separate_requests_draw(name: str, flags: dict[str, Any]) -> None:
    from tessera.core.messages import choice_seed

    prompt = prompts()[4]
    forked = [Submit("f", prompt, msgspec.structs.replace(SAMPLED, seed=5), n=4)]
    separate = [Submit(f"s{i}", prompt, msgspec.structs.replace(SAMPLED, seed=choice_seed(5, i))) for i in range(4)]
    one = serve(model(name), forked, dtype="float64", **flags).tokens()
    many = serve(model(name), separate, dtype="float64", disable_radix_cache=True, **flags).tokens()
    assert [one["f", i] for i in range(4)] == [many[f"s{i}", 0] for i in range(4)]
    assert len({tuple(t) for t in one.values()}) == 4
