"""The trained models give the same greedy answers in float32, however the work and the ranks are laid out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tessera.core.messages import SamplingParams, Submit
from tessera.core.weights import weight_table
from tessera.evals.tasks import TASKS
from tessera.models.folder import find_model, open_source, read_model
from tessera.serve.assets import load_assets
from tiny import Run, TinyModel, resolved, serve

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=64)
EACH = 8  # questions of each task
BASE: dict[str, Any] = {"dtype": "float32", "page_size": 16, "max_total_tokens": 8192, "max_running_requests": 24}
MODELS = ("abacus-hybrid", "abacus-mla")
LAYOUTS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "chunk 64": {"chunked_prefill_size": 64},
    "mixed, chunk 48": {"enable_mixed_chunk": True, "chunked_prefill_size": 48},
    "preempted": {"page_size": 4, "max_total_tokens": 600, "disable_radix_cache": True},
    "four ranks": {"tp": 4},
    "two groups of attention, experts spread": {"tp": 2, "dp": 2, "ep": 2, "enable_dp_attention": True},
}


@cache
def trained(name: str) -> TinyModel:
    folder = find_model(name)
    spec = read_model(folder)
    table = weight_table(spec, resolved(spec).config.mesh.mesh)
    return TinyModel(spec, open_source(folder, spec, table))


@cache
def questions(name: str) -> tuple[list[Submit], list[str]]:
    """The same questions for every layout, as requests, and their targets."""
    assets = load_assets(find_model(name), None, None)
    assert assets.tokenizer is not None
    assert assets.template is not None
    asked = [q for task in TASKS.values() for q in task.questions("heldout", EACH, seed=5)]
    texts = [assets.template.render([{"role": "user", "content": q.prompt}], True, False, {}) for q in asked]
    prompts = [assets.tokenizer.encode(text, False) for text in texts]
    return [Submit(f"q{i}", prompt, GREEDY) for i, prompt in enumerate(prompts)], [q.target for q in asked]


def run(name: str, together: bool = True, **flags: Any) -> Run:
    return serve(trained(name), questions(name)[0], together, **{**BASE, **flags})


@cache
def alone(name: str) -> Run:
    return run(name, together=False, disable_overlap_schedule=True, disable_radix_cache=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_one_rank_and_one_request_at_a_time(name: str, layout: str) -> None:
    found = run(name, **LAYOUTS[layout])
    assert found.ends() == alone(name).ends()
    assert (sum(r.num_preempted for r in found.reports) > 0) == (layout == "preempted")


@pytest.mark.parametrize("name", MODELS)
def test_most_answers_are_right(name: str) -> None:
    tokenizer = load_assets(find_model(name), None, None).tokenizer
    assert tokenizer is not None
    answers = alone(name).answers
    tasks = [task for task in TASKS.values() for _ in range(EACH)]
    texts = [tokenizer.decode(answers[f"q{i}", 0].tokens) for i in range(len(tasks))]
    right = [t.extract(text) == target for t, text, target in zip(tasks, texts, questions(name)[1], strict=True)]
    assert sum(right) >= 0.9 * len(right), texts
