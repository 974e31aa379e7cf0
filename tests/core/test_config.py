"""No silent change: a flag is honoured or refused by name, every choice is a decision, and `resolve` is pure."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from tessera.core.config import FLAGS, Config, Decision, Hardware, Notes, Resolved, read, resolve
from tessera.core.errors import ConfigError
from tessera.core.families import read_spec
from tessera.core.spec import ModelSpec

CPU = Hardware("cpu", memory=8 << 30)
CUDA = Hardware("cuda", memory=79 << 30, capability=(9, 0))

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}
HYBRID = {
    **DENSE,
    "architectures": ["Qwen3NextForCausalLM"],
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
}


def spec_of(config: dict[str, Any] = DENSE, **changes: Any) -> ModelSpec:
    return read_spec({**config, **changes})


def resolved(spec: ModelSpec | None = None, hardware: Hardware = CPU, **asked: object) -> Resolved:
    return resolve({"model_path": "m", **asked}, spec or spec_of(), hardware)


def config_of(spec: ModelSpec | None = None, hardware: Hardware = CPU, **asked: object) -> Config:
    return resolved(spec, hardware, **asked).config


def refusals(spec: ModelSpec | None = None, hardware: Hardware = CPU, **asked: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(spec, hardware, **asked)
    return [str(c) for c in caught.value.conflicts]


def decided(result: Resolved, what: str) -> Decision:
    (found,) = [d for d in result.decisions if d.what == what]
    return found


def test_defaults_resolve_and_every_choice_is_told() -> None:
    result = resolved()
    config = result.config
    assert (config.model.dtype, config.model.context_length) == ("bfloat16", 4096)
    assert config.scheduling.prefix_cache
    assert config.scheduling.max_in_flight == 2
    assert config.memory.num_slots == 0
    for what in ("device", "dtype", "chunked-prefill-size", "max-running-requests", "KV pool", "attention-backend"):
        assert decided(result, what).why


@pytest.mark.parametrize(("hardware", "asked", "size"), [(CPU, {}, 16), (CUDA, {}, 64), (CUDA, {"page_size": 16}, 16)])
def test_pages_are_of_a_size_that_suits_the_device(hardware: Hardware, asked: dict[str, int], size: int) -> None:
    result = resolved(hardware=hardware, max_total_tokens=6400, **asked)
    assert result.config.memory.page_size == size
    assert result.config.memory.num_pages == 1 + 6400 // size
    assert asked or (decided(result, "page-size").value, bool(decided(result, "page-size").why)) == (size, True)
    assert not asked or "page-size" not in {decision.what for decision in result.decisions}


def test_resolve_is_pure_and_frozen() -> None:
    asked = {"model-path": "m", "--max-running-requests": "3", "enable_mixed_chunk": True}
    before = dict(asked)
    first, second = (resolve(asked, spec_of(), CPU) for _ in range(2))
    assert first == second
    assert asked == before
    with pytest.raises(FrozenInstanceError):
        first.config.scheduling.mixed = False  # type: ignore[misc]


def test_all_conflicts_are_reported_together() -> None:
    text = refusals(
        pp=4,
        attention_backend="trtllm_mha",
        page_size=0,
        dtype="flot32",
        context_length=10**6,
        fp8_gemm_backend="cutlass",
        atention_backend="torch",
        kv_cache_dtype="fp4_e2m1",
    )
    for name, remedy in (
        ("--pp-size 4", "Leave it out, or use 1"),
        ("--attention-backend trtllm_mha", "allowed: auto, torch"),
        ("--page-size", "from 1 to 1024"),
        ("--dtype", "Did you mean float32?"),
        ("--context-length 1000000 with the model", "at most --context-length 4096"),
        ("--fp8-gemm-backend cutlass", "allowed: auto, triton"),
        ("atention_backend", "Did you mean --attention-backend"),
        ("--kv-cache-dtype fp4_e2m1", "use 'fp8_e4m3', or keep 'auto'"),
    ):
        assert any(t.startswith(name) and remedy.lower() in t.lower() for t in text), (name, text)
    assert len(text) == 8


def test_the_model_path_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--model-path"):
        resolve({}, spec_of(), CPU)


def test_one_value_in_two_spellings_is_one_value_and_two_values_conflict() -> None:
    assert config_of(tp=1, tensor_parallel_size="1").mesh.tp == 1
    assert "asked twice" in refusals(port=1, **{"--port": 2})[0]


@pytest.mark.parametrize(
    ("asked", "checkpoint", "bf16", "chosen"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "bfloat16", False, "float32"),
        ("auto", "float16", True, "float32"),
        ("auto", "float32", True, "float32"),
        ("half", "bfloat16", True, "float16"),
        ("float64", "bfloat16", False, "float64"),
    ],
)
def test_dtype(asked: str, checkpoint: str, bf16: bool, chosen: str) -> None:
    config = config_of(spec_of(dtype=checkpoint), replace(CPU, bf16=bf16), dtype=asked)
    assert config.model.dtype == config.memory.kv_dtype == config.memory.conv_dtype == chosen


@pytest.mark.parametrize(("asked", "kept"), [("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_pages_in_fp8_are_half_as_large_and_the_scale_is_told(asked: str, kept: str) -> None:
    result = resolved(spec_of(HYBRID), kv_cache_dtype=asked)
    memory, plain = result.config.memory, config_of(spec_of(HYBRID)).memory
    assert (memory.kv_dtype, memory.conv_dtype, memory.slot_bytes) == (kept, plain.conv_dtype, plain.slot_bytes)
    assert memory.page_bytes * 2 == plain.page_bytes
    assert decided(result, "scales of keys and values").value == 1.0


def test_a_card_that_does_not_know_e4m3_is_refused_its_pages() -> None:
    old = replace(CUDA, capability=(8, 0))
    assert "8.9 on" in refusals(None, old, kv_cache_dtype="fp8_e4m3")[0]
    assert config_of(None, old, kv_cache_dtype="fp8_e4m3", attention_backend="torch").memory.kv_dtype == "float8_e4m3fn"
    assert config_of(None, old, kv_cache_dtype="fp8_e5m2").memory.kv_dtype == "float8_e5m2"
    assert config_of(None, CUDA, kv_cache_dtype="fp8_e4m3").kernels.attention == "triton"


def test_states_are_wide_unless_asked_otherwise() -> None:
    assert config_of(spec_of(HYBRID)).memory.state_dtype == "float32"
    assert config_of(spec_of(HYBRID), dtype="float64").memory.state_dtype == "float64"
    assert config_of(spec_of(HYBRID), mamba_ssm_dtype="bfloat16").memory.state_dtype == "bfloat16"


def test_a_hybrid_has_slots_and_no_prefix_cache_and_says_so() -> None:
    result = resolved(spec_of(HYBRID), max_running_requests=5)
    assert result.config.memory.num_slots == 6
    assert not result.config.scheduling.prefix_cache
    assert "recurrent state" in decided(result, "prefix cache").why
    asked_off = resolved(spec_of(HYBRID), disable_radix_cache=True)
    assert not [d for d in asked_off.decisions if d.what == "prefix cache"]


def test_pools_stay_within_the_share_of_the_memory() -> None:
    for fraction in (0.01, 0.2, 1.0):
        for spec in (spec_of(), spec_of(HYBRID)):
            memory = config_of(spec, mem_fraction_static=fraction, hardware=replace(CPU, memory=1 << 30)).memory
            assert memory.budget == int(fraction * (1 << 30))
            assert memory.weight_bytes + memory.kv_bytes + memory.state_bytes <= memory.budget


def test_bytes_are_those_of_the_tensors() -> None:
    memory = config_of(spec_of(HYBRID), page_size=8, dtype="float32").memory
    assert memory.page_bytes == 2 * 2 * 8 * 16 * 4  # kv, heads, tokens, dim, bytes: one attention layer
    assert memory.slot_bytes == (2 * 2 * 16 + 4 * 16) * 3 * 4 + 4 * 16 * 16 * 4  # conv window and state: one layer


def test_the_pool_is_no_larger_than_all_rows_need() -> None:
    memory = config_of(max_running_requests=2, context_length=100, page_size=16).memory
    assert memory.num_pages == 2 * 7 + 1


def test_max_total_tokens_sizes_the_pool_and_with_it_the_context() -> None:
    result = resolved(max_total_tokens=100, page_size=16)
    assert result.config.memory.num_pages == 112 // 16 + 1  # and the scratch page
    assert result.config.model.context_length == 112
    assert decided(result, "context-length").value == 112
    (text,) = refusals(max_total_tokens=100, context_length=200)
    assert text.startswith("--context-length 200 with the KV pool: the pool holds 112 tokens. Use at most")


def test_too_little_memory_is_refused_with_what_would_do() -> None:
    (text,) = refusals(mem_fraction_static=0.00001)
    assert "--mem-fraction-static" in text
    assert "Raise --mem-fraction-static above" in text
    (text,) = refusals(max_total_tokens=10**9)
    assert "Use at most --max-total-tokens" in text


def test_states_limit_the_rows() -> None:
    small = replace(CPU, memory=1 << 20)
    result = resolved(spec_of(HYBRID), small)
    assert result.config.scheduling.max_running < 64
    assert "states" in decided(result, "max-running-requests").why
    assert ["its states need" in t for t in refusals(spec_of(HYBRID), small, max_running_requests=10**4)] == [True]
    text = refusals(spec_of(HYBRID), max_running_requests=8, max_mamba_cache_size=4)
    assert "--max-running-requests 4" in text[0]
    assert config_of(spec_of(HYBRID), max_mamba_cache_size=4).scheduling.max_running == 4


def test_chunks() -> None:
    assert config_of().scheduling.chunk_size == 512
    assert config_of(hardware=CUDA).scheduling.chunk_size == 8192
    uncut = config_of(chunked_prefill_size=-1, max_prefill_tokens=77).scheduling
    assert (uncut.chunk_size, uncut.max_prefill_tokens) == (0, 77)
    assert config_of(chunked_prefill_size=20000).scheduling.max_prefill_tokens == 20000
    assert config_of(chunked_prefill_size=3).scheduling.chunk_size == 3
    assert config_of(max_prefill_tokens=100).scheduling.chunk_size == 100
    assert config_of(hardware=CUDA, chunked_prefill_size=256).scheduling.alone_size == 256


def test_chunks_are_longer_while_nobody_decodes_and_where_experts_see_few_tokens() -> None:
    def sizes(**asked: object) -> tuple[int, int, int]:
        found = config_of(spec_of(HYBRID), CUDA, **asked).scheduling
        return found.chunk_size, found.alone_size, found.max_prefill_tokens

    many = {**HYBRID, "num_experts": 512, "num_experts_per_tok": 10}
    found = config_of(spec_of(many), CUDA).scheduling
    assert (found.chunk_size, found.alone_size, found.max_prefill_tokens) == (16384, 32768, 32768)
    assert sizes() == (8192, 32768, 32768)
    assert sizes(max_prefill_tokens=9000) == (8192, 9000, 9000)
    assert sizes(chunked_prefill_size=9000) == (9000, 9000, 16384)
    assert config_of().scheduling.alone_size == 512
    assert config_of(hardware=CUDA).scheduling.alone_size == 8192, "dense"
    assert "--max-prefill-tokens 8" in refusals(chunked_prefill_size=9, max_prefill_tokens=8)[0]


def test_the_longest_prefix_policy_needs_a_prefix_cache() -> None:
    assert config_of(schedule_policy="lpm").scheduling.policy == "lpm"
    assert "fcfs" in refusals(schedule_policy="lpm", disable_radix_cache=True)[0]
    assert "recurrent" in refusals(spec_of(HYBRID), schedule_policy="lpm")[0]


def test_a_device_that_is_not_there_is_refused() -> None:
    assert "found cpu only" in refusals(device="cuda")[0]
    assert config_of(hardware=CUDA, device="cuda").mesh.device == "cuda"


def test_no_tokeniser_and_a_tokeniser_conflict() -> None:
    assert config_of(skip_tokenizer_init=True).model.tokenizer_path is None
    assert "--skip-tokenizer-init" in refusals(skip_tokenizer_init=True, tokenizer_path="t")[0]


def test_secrets_are_not_shown() -> None:
    config = config_of(api_key="hidden-key")
    assert config.serving.api_key == "hidden-key"
    assert "hidden-key" not in repr(config) + repr(config.public())
    assert config.public()["serving"]["api_key"] == "set"


def test_none_asks_for_nothing() -> None:
    assert resolved(**{flag.name: None for flag in FLAGS if flag.name != "model_path"}) == resolved()


def test_reading_goes_on_after_a_wrong_value() -> None:
    notes = Notes()
    values = read({"port": "x", "host": "h"}, notes)
    assert (values.number("port"), values.word("host")) == (30000, "h")
    assert [c.flags for c in notes.conflicts] == [("--port",)]


def test_a_watchdog_that_an_idle_engine_cannot_satisfy_is_refused_and_no_start_is_bound_by_a_short_one() -> None:
    """An idle engine gives a sign of life every second; imports and compilers give none for many."""
    for value in (0, 0.5, 1.9):
        assert any(
            "--watchdog-timeout" in line and "a number from 2" in line for line in refusals(watchdog_timeout=value)
        )
    for value, start in ((2.0, 300.0), (300.0, 300.0), (1000.0, 1000.0)):
        found = resolved(watchdog_timeout=value)
        assert (found.config.serving.watchdog_timeout, found.config.serving.start_timeout) == (value, start)
        told = [d.why for d in found.decisions if d.what == "watchdog-timeout"]
        assert told == (["a start may be silent for 300 s"] if value < start else [])
