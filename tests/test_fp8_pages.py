"""Keys, values and latents in fp8: chunks, batches, cached prefixes and ranks still never change the answer.

Everything that attends reads the rounded numbers from the pages, those of the step's own tokens too; a rank rounds the
heads that it holds as one rank rounds them. So in float64 the tokens are the same ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from test_invariance import PLAIN, model, requests
from tiny import TINY, Run, serve

LAYOUTS: dict[str, dict[str, Any]] = {
    "all at once": {"disable_radix_cache": True},
    "chunk 3": {"chunked_prefill_size": 3},
    "mixed, chunk 20": {"enable_mixed_chunk": True, "chunked_prefill_size": 20},
    "tiny pool": {"max_total_tokens": 96},
    "prefix cache, one at a time": {"together": False},
    "two ranks": {"tp": 2},
    "four ranks": {"tp": 4},
    "two groups of attention": {"tp": 2, "dp": 2, "enable_dp_attention": True},
}


def run(name: str, kv: str, together: bool = True, **flags: Any) -> Run:
    return serve(model(name), requests("varied"), together, dtype="float64", kv_cache_dtype=kv, **flags)


@cache
def alone(name: str, kv: str) -> Run:
    return run(name, kv, False, **PLAIN)


CASES = [*(("fp8_e4m3", layout) for layout in LAYOUTS), ("fp8_e5m2", "chunk 3"), ("fp8_e5m2", "two ranks")]


@pytest.mark.parametrize(("kv", "layout"), CASES)
@pytest.mark.parametrize("name", TINY)
def test_answers_are_those_of_one_rank_and_each_request_alone(name: str, kv: str, layout: str) -> None:
    assert run(name, kv, **LAYOUTS[layout]).ends() == alone(name, kv).ends()


def test_prefixes_in_fp8_are_cached() -> None:
    assert run("qwen3", "fp8_e4m3", together=False).answers["r8", 0].num_cached == 32


@pytest.mark.parametrize("name", TINY)
def test_the_pages_are_what_was_asked_for(name: str) -> None:
    answers = [alone(name, kv).ends() for kv in ("auto", "fp8_e4m3", "fp8_e5m2")]
    assert answers[0] != answers[1] != answers[2], "rounding must be seen somewhere"
