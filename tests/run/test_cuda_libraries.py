"""On a CUDA device: kernels of libraries give the tokens of ours, wherever two tokens are not as good as alike.

Logits in bfloat16 differ a little with the batch, whatever the kernels. That noise is measured between two batchings of
our own kernels; where the best token leads by more than four times of it, every kernel must draw it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import msgspec
import pytest

from tessera.core.config.kernels import LIBRARIES
from test_trained import questions, trained
from tiny import Answer, Run, serve

BASE: dict[str, Any] = {
    "device": "cuda", "dtype": "bfloat16", "page_size": 16, "max_total_tokens": 8192, "max_running_requests": 24,
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "flashinfer": {"attention_backend": "flashinfer", "disable_cuda_graph": True},
    "flashinfer, graphs": {"attention_backend": "flashinfer"},
    "flashinfer, mixed chunks": {
        "attention_backend": "flashinfer",
        "disable_cuda_graph": True,
        "enable_mixed_chunk": True,
        "chunked_prefill_size": 48,
    },
    "grouped_mm": {"moe_runner_backend": "grouped_mm"},
}  # fmt: skip  (DeepGEMM takes columns in 64s, these models' experts have 48: start-up refuses it)


def run(name: str, together: bool = True, **flags: Any) -> Run:
    asked = [
        msgspec.structs.replace(q, params=msgspec.structs.replace(q.params, logprobs=2)) for q in questions(name)[0]
    ]
    return serve(trained(name), asked, together, **{**BASE, **flags})


@cache
def ours(name: str, together: bool) -> Run:
    return run(name, together, attention_backend="triton")


def alike(a: Answer, b: Answer) -> int:
    """Tokens before the first that differs."""
    pairs = zip(a.tokens, b.tokens, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)))


@cache
def noise(name: str) -> float:
    """The largest difference of a likeliest token's logprob between two batchings."""
    found = 0.0
    for key, a in ours(name, True).answers.items():
        b = ours(name, False).answers[key]
        for i in range(alike(a, b)):
            found = max(found, abs(a.logprobs[i].top_logprobs[0] - b.logprobs[i].top_logprobs[0]))
    return found


@pytest.mark.gpu
@pytest.mark.timeout(600)  # kernels are compiled when they are met first
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["abacus-hybrid", "abacus-mla"])
def test_greedy_tokens_are_those_of_our_kernels(name: str, choice: str) -> None:
    library = next((value for value in CHOICES[choice].values() if value in LIBRARIES), None)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    found, total = run(name, **CHOICES[choice]), 0
    for key, expected in ours(name, True).answers.items():
        at = alike(expected, found.answers[key])
        total += at
        if at < len(expected.tokens):
            best, second = expected.logprobs[at].top_logprobs[:2]
            assert best - second <= 4 * noise(name), (
                f"{key}: token {at} of {expected.tokens}, a lead of {best - second}"
            )
    assert total > 200, "hardly a token was compared"
