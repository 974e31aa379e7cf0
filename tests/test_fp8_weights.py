"""The trained models with their weights in fp8: the same answers on one rank and on several, and good ones.

The plain twin in float64, where a rounding of reordered sums tips no activation over to fp8's next number. Two ranks
take the experts and shared experts whole: blocks of 128 are wider than what half of an expert would be.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tessera.core.quantization import Quantization
from tessera.evals.tasks import TASKS
from tessera.models.folder import find_model
from tessera.models.quantizing import Quantizing
from tessera.serve.assets import load_assets
from test_trained import BASE, EACH, MODELS, questions, trained
from tiny import Run, TinyModel, serve

FP8: dict[str, Any] = {**BASE, "dtype": "float64", "quantization": "fp8", "fp8_gemm_backend": "torch"}
SPREAD = {"tp": 2, "ep": 2, "moe_a2a_backend": "all_to_all", "moe_dense_tp_size": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed, chunk 48": {"enable_mixed_chunk": True, "chunked_prefill_size": 48},
    "two ranks, experts spread": SPREAD,
    "two groups of attention": {**SPREAD, "dp": 2, "enable_dp_attention": True},
}


@cache
def quantised(name: str) -> TinyModel:
    plain = trained(name)
    return TinyModel(plain.spec, Quantizing(plain.source, Quantization(loading=True)))


def run(name: str, **flags: Any) -> Run:
    return serve(quantised(name), questions(name)[0], **{**FP8, **flags})


@cache
def one_rank(name: str) -> Run:
    return run(name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_one_rank(name: str, layout: str) -> None:
    assert run(name, **LAYOUTS[layout]).ends() == one_rank(name).ends()


@pytest.mark.parametrize("name", MODELS)
def test_most_answers_are_right(name: str) -> None:
    tokenizer = load_assets(find_model(name), None, None).tokenizer
    assert tokenizer is not None
    answers = one_rank(name).answers
    tasks = [task for task in TASKS.values() for _ in range(EACH)]
    texts = [tokenizer.decode(answers[f"q{i}", 0].tokens) for i in range(len(tasks))]
    right = [t.extract(text) == target for t, text, target in zip(tasks, texts, questions(name)[1], strict=True)]
    assert sum(right) >= 0.85 * len(right), texts
