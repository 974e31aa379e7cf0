"""All that is wrong is told in one round, bad values and bad combinations; what only a value that could not be read
would make wrong is not told: the user would mend what is not broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.test_config import CPU, CUDA, DENSE, HYBRID, spec_of
from tessera.core.config import FLAGS, Flag, Hardware, resolve
from tessera.core.errors import ConfigError

BAD = "\x00"  # no flag with choices, numbers or a switch reads it
TINY = replace(CPU, memory=20_000)  # holds neither weights nor pools
COMBINATIONS = [
    (CPU, {"tp": 2, "ep": 3}),
    (CPU, {"tp": 4, "dp": 3, "enable_dp_attention": True}),
    (CPU, {"tp": 4, "dp": 2, "enable_dp_attention": True, "moe_dense_tp_size": 4, "ep": 4}),
    (CPU, {"tp": 2, "enable_dp_attention": True}),
    (CPU, {"tp": 2, "enable_dp_lm_head": True}),
    (CPU, {"tp": 2, "nnodes": 3, "node_rank": 5}),
    (CUDA, {"tp": 2, "nnodes": 2, "dp": 2}),
    (CUDA, {"tp": 8}),
    (CUDA, {"dp": 2, "disaggregation_mode": "decode", "disaggregation_transfer_backend": "cuda_ipc"}),
    (CPU, {"tp": 2, "collectives": "nccl", "moe_a2a_backend": "all_to_all"}),
    (CPU, {"context_length": 10**6}),
    (TINY, {"max_total_tokens": 10**9}),
    (TINY, {"max_total_tokens": 1, "mem_fraction_static": 0.99}),
    (CPU, {"max_running_requests": 9, "max_mamba_cache_size": 4}),
    (TINY, {"max_mamba_cache_size": 10**8}),
    (CPU, {"chunked_prefill_size": 512, "max_prefill_tokens": 256}),
    (CPU, {"schedule_policy": "lpm", "on_failure": "continue", "disable_radix_cache": True}),
    (CPU, {"skip_tokenizer_init": True, "tokenizer_path": "t"}),
    (CUDA, {"quantization": "fp8", "moe_runner_backend": "grouped_mm", "fp8_gemm_backend": "triton"}),
    (CUDA, {"parts_dtype": "float32", "moe_runner_backend": "grouped_mm"}),
    (CUDA, {"dtype": "float64", "attention_backend": "triton"}),
    (CUDA, {"attention_backend": "flashinfer", "kv_cache_dtype": "float16"}),
    (CUDA, {"cuda_graph_bs": "1,2", "cuda_graph_max_bs": 4}),
]
QUIET = {"speculation", "hand-over", "serving", "logging"}  # groups of flags that little else depends on


def told(model: dict[str, object], hardware: Hardware, asked: dict[str, object]) -> dict[str, str]:
    """Conflicts by the names of their flags, without values."""
    try:
        resolve({"model_path": "m", **asked}, spec_of(model), hardware)
    except ConfigError as error:
        return {" ".join(flag.split()[0] for flag in c.flags): str(c) for c in error.conflicts}
    return {}


def values_of(flag: Flag) -> list[object]:
    """Values that it may have, the default (left out) among them."""
    found: list[object] = [None]
    most = "8" if flag.group == "mesh" else "100000000"
    for value in (*flag.choices, True, False, "1", "2", "0.3", most):
        try:
            flag.parse(value)
        except ValueError:
            continue
        if not flag.choices or str(value) in flag.choices:
            found.append(value)
    return found


BADLY = [flag for flag in FLAGS if flag.spellings[0] in told(DENSE, CPU, {flag.name: BAD})]


def test_bad_values_and_bad_combinations_are_told_together() -> None:
    found = told(HYBRID, CPU, {"page_size": 0, "tp": 2, "ep": 3, "context_length": 10**6, "frob": 1})
    assert set(found) == {"--page-size", "--ep-size --tp-size", "--context-length the", "frob"}


def test_what_a_bad_value_would_have_to_say_is_not_guessed() -> None:
    assert set(told(HYBRID, CPU, {"tp": "x", "ep": 3})) == {"--tp-size"}
    assert set(told(HYBRID, CPU, {"tp_sise": 3, "ep": 3})) == {"tp_sise"}  # surely --tp-size was meant
    assert set(told(HYBRID, TINY, {"dtype": "flot32"})) == {"--dtype"}  # perhaps a narrower one fits
    assert "--mem-fraction-static" in told(HYBRID, TINY, {"port": "x"})  # it weighs nothing


@pytest.mark.parametrize(
    ("place", "asked"), COMBINATIONS, ids=lambda v: v.device if isinstance(v, Hardware) else str(v)
)
def test_a_combination_is_refused_beside_a_bad_value_only_if_no_good_one_would_mend_it(
    place: Hardware, asked: dict[str, object]
) -> None:
    groups = {flag.group for flag in FLAGS if asked.keys() & set(flag.keys)}
    for flag in BADLY:
        if flag.group in QUIET - groups:
            continue
        others = {key: value for key, value in asked.items() if key not in flag.keys}
        beside = told(HYBRID, place, {**others, flag.name: BAD})
        assert flag.spellings[0] in beside
        claimed = beside.keys() - {flag.spellings[0]}
        for value in values_of(flag) if claimed else ():
            wrong = claimed - told(HYBRID, place, {**others, flag.name: value}).keys()
            assert not wrong, (flag.name, value, [beside[name] for name in wrong])
