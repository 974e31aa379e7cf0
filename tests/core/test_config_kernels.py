"""Promise: which kernels run, and which steps run as CUDA graphs, is asked for or told, and every row fits a size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.test_config import CPU, CUDA, DENSE, HYBRID, config_of, decided, refusals, resolved, spec_of
from tessera.core.config.kernels import GRAPH_TOKENS, LIBRARIES
from tessera.core.config.types import Hardware
from tessera.core.parts import NOTHING, Wide


def graphs(**asked: object) -> tuple[tuple[int, ...], ...]:
    return config_of(spec_of(HYBRID), CUDA, **asked).kernels.graphs


@pytest.mark.parametrize("rows", [1, 7, 8, 63, 64, 65, 256, 500, 512])
def test_a_step_of_all_rows_fits_a_size(rows: int) -> None:
    decode, segments, _ = graphs(max_running_requests=rows)
    assert decode[-1] == rows
    assert segments[-1] >= rows + 1, "one range of the largest size is padding"


ALL_TO_ALL = {"moe_a2a_backend": "all_to_all", "tp_size": 2, "ep_size": 2}
COUNTED = {**ALL_TO_ALL, "moe_a2a_padded_tokens": 0}


def test_steps_whose_tokens_travel_uncounted_run_as_graphs() -> None:
    found = resolved(spec_of(HYBRID), replace(CUDA, count=4), moe_a2a_backend="all_to_all", tp_size=4, ep_size=4)
    kernels, told = found.config.kernels, {decision.what: decision for decision in found.decisions}
    assert kernels.graphs[2] == GRAPH_TOKENS
    assert kernels.padded_up_to == told["moe-a2a-padded-tokens"].value >= GRAPH_TOKENS[-1]
    few = resolved(
        spec_of(HYBRID), replace(CUDA, count=4), moe_a2a_padded_tokens=512, moe_a2a_backend="all_to_all", tp_size=4,
        ep_size=4, dp_size=2, enable_dp_attention=True, max_running_requests=500,
    ).config.kernels  # fmt: skip
    assert few.graphs[2][-1] == 256, "of 512 tokens in all, half are a DP rank's"
    assert few.graphs[0][-1] == 256
    assert resolved(spec_of(HYBRID), **ALL_TO_ALL).config.kernels.padded_up_to == 0, "on a CPU counting costs little"
    alone = resolved(spec_of(HYBRID), moe_a2a_padded_tokens=5)
    assert {d.what: d.value for d in alone.decisions}["--moe-a2a-padded-tokens"] == "ignored"


@pytest.mark.parametrize("off", [{"disable_cuda_graph": True}, {"attention_backend": "torch"}, COUNTED], ids=str)
def test_graphs_that_are_off_are_told_and_so_is_each_flag_that_sizes_them(off: dict[str, object]) -> None:
    found = resolved(spec_of(HYBRID), replace(CUDA, count=2), cuda_graph_max_bs=8, **off)
    told = {decision.what: decision.value for decision in found.decisions}
    assert found.config.kernels.graphs == ((), (), ())
    assert told["CUDA graphs"] == "off"
    assert told["--cuda-graph-max-bs"] == "ignored"


def test_sizes_are_those_asked_for() -> None:
    assert graphs(cuda_graph_bs=(4, 1, 4))[0] == (1, 4)
    assert graphs(cuda_graph_max_bs=3)[0] == (1, 2, 3)
    for size, told in ((9, True), (8, False)):
        why = decided(resolved(spec_of(), CUDA, max_running_requests=8, cuda_graph_max_bs=size), "CUDA graphs").why
        assert ("no step has more than 8" in why) == told


def test_float64_gets_kernels_that_compute_in_it() -> None:
    assert config_of(spec_of(HYBRID), CUDA, dtype="float64").kernels.attention == "torch"
    assert config_of(spec_of(HYBRID), CUDA).kernels.attention == "triton"


DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "rope_theta": 1e4,
}
EQUIPPED = replace(CUDA, libraries=tuple(LIBRARIES))
WIDE = spec_of(HYBRID, head_dim=64, moe_intermediate_size=64)
OLDER = replace(EQUIPPED, capability=(8, 0))
REFUSED = {
    "no library": (WIDE, CUDA, {"attention_backend": "flashinfer"}, "pip install 'tessera-llm[flashinfer]'"),
    "no other library": (WIDE, CUDA, {"moe_runner_backend": "deep_gemm"}, "pip install 'tessera-llm[deep-gemm]'"),
    "heads": (spec_of(DENSE), EQUIPPED, {"attention_backend": "flashinfer"}, "heads have 16 dims"),
    "fp32": (WIDE, EQUIPPED, {"attention_backend": "flashinfer", "dtype": "float32"}, "the model is in float32"),
    "keys": (WIDE, EQUIPPED, {"attention_backend": "flashinfer", "kv_cache_dtype": "float32"}, "dtype of queries"),
    "older": (WIDE, OLDER, {"moe_runner_backend": "grouped_mm"}, "needs compute capability 9.0"),
    "fp16": (WIDE, EQUIPPED, {"moe_runner_backend": "deep_gemm", "dtype": "float16"}, "the model is in float16"),
}


@pytest.mark.parametrize(("spec", "hardware", "asked", "why"), REFUSED.values(), ids=REFUSED)
def test_what_a_library_cannot_do_is_refused_with_the_reason(spec, hardware, asked, why) -> None:
    (refusal,) = refusals(spec, hardware, **asked)
    assert why in refusal
    assert f"--{next(iter(asked)).replace('_', '-')} {next(iter(asked.values()))}" in refusal


def test_latents_of_another_size_are_refused() -> None:
    spec = spec_of(DEEPSEEK)
    (refusal,) = refusals(spec, EQUIPPED, attention_backend="flashinfer")
    assert "latents have 32 + 16 dims" in refusal


def test_flashinfer_reads_keys_in_fp8_but_no_latents() -> None:
    narrow = {"attention_backend": "flashinfer", "kv_cache_dtype": "fp8_e4m3"}
    assert config_of(WIDE, EQUIPPED, **narrow).memory.kv_dtype == "float8_e4m3fn"
    (refusal,) = refusals(spec_of(DEEPSEEK, kv_lora_rank=512, qk_rope_head_dim=64), EQUIPPED, **narrow)
    assert "reads latents in the dtype of queries" in refusal


def test_grouped_products_of_torch_are_not_for_experts_in_fp8() -> None:
    """They would be asked for and not run."""
    asked = {"moe_runner_backend": "grouped_mm", "quantization": "fp8"}
    (refusal,) = refusals(WIDE, EQUIPPED, **asked)
    assert "--fp8-gemm-backend dequantize" in refusal
    assert config_of(WIDE, EQUIPPED, fp8_gemm_backend="dequantize", **asked).kernels.moe == "grouped_mm"


def test_kernels_of_the_gpu_are_refused_without_one() -> None:
    for asked in ({"attention_backend": "flashinfer"}, {"moe_runner_backend": "deep_gemm"}):
        assert any("need a CUDA device" in refusal for refusal in refusals(WIDE, **asked))
    (refusal,) = refusals(WIDE, moe_runner_backend="grouped_mm", dtype="float64")
    assert "the model is in float64" in refusal
    assert config_of(WIDE, moe_runner_backend="grouped_mm").kernels.moe == "grouped_mm"


def test_flashinfer_has_our_kernels_around_it_and_says_which_steps_it_serves() -> None:
    result = resolved(WIDE, EQUIPPED, attention_backend="flashinfer")
    kernels, told = result.config.kernels, {decision.what: decision for decision in result.decisions}
    assert (kernels.attention, kernels.delta, kernels.moe, kernels.sampling) == (
        "flashinfer",
        "triton",
        "triton",
        "torch",
    )
    assert told["attention of steps that run as CUDA graphs"].value == "triton"
    assert "minutes at the first start" in told["kernels of FlashInfer"].why
    whole = resolved(WIDE, EQUIPPED, attention_backend="flashinfer", disable_cuda_graph=True)
    assert not any("steps that run as CUDA graphs" in decision.what for decision in whole.decisions)


def test_auto_says_what_it_took_and_why() -> None:
    told = {decision.what: str(decision) for decision in resolved(WIDE, EQUIPPED).decisions}
    assert "triton" in told["attention-backend"]
    assert "flashinfer is ahead in long prompts only" in told["attention-backend"]
    assert "triton" in told["moe-runner-backend"]


PAIR = replace(CUDA, count=2)
WHOLE, CUT = {"ep_size": 2}, {"ep_size": 1}


@pytest.mark.parametrize(
    ("asked", "hardware", "layout", "parts", "wide"),
    [
        ("auto", CPU, WHOLE, "model", NOTHING),
        ("auto", PAIR, WHOLE, "sums", Wide(sums=True)),
        ("auto", PAIR, CUT, "sums", NOTHING),  # the name is the same, so that servers of unequal layouts fit
        ("sums", CPU, WHOLE, "sums", Wide(sums=True)),
        ("sums", PAIR, CUT, "sums", NOTHING),
        ("model", PAIR, WHOLE, "model", NOTHING),
        ("float32", PAIR, CUT, "float32", Wide(sums=True, rows=True)),
    ],
)
def test_what_is_kept_wide(asked: str, hardware: Hardware, layout: dict[str, int], parts: str, wide: Wide) -> None:
    """And it is told where nobody asked."""
    found = resolved(spec_of(HYBRID), hardware, tp_size=2, dtype="bfloat16", parts_dtype=asked, **layout)
    assert (found.config.kernels.parts, found.config.kernels.wide) == (parts, wide)
    assert ("parts-dtype" in {d.what for d in found.decisions}) == (asked == "auto")
    told = [d.why for d in found.decisions if d.what == "--parts-dtype"]
    assert bool(told) == (asked == "sums" and wide == NOTHING), "what a layout does not honour is told"
    known = resolved(spec_of(HYBRID), tp_size=2, dtype="float32", parts_dtype=asked)
    assert known.config.kernels.wide == NOTHING
    assert {d.what: d.value for d in known.decisions}.get("--parts-dtype", "ignored") == "ignored"


def test_products_that_round_are_refused_where_parts_are_to_be_wide() -> None:
    asked = {"dtype": "bfloat16", "parts_dtype": "float32", "moe_runner_backend": "grouped_mm"}
    (refusal,) = refusals(spec_of(HYBRID), **asked)
    assert refusal.startswith("--parts-dtype float32 with --moe-runner-backend grouped_mm: torch._grouped_mm gives the")


def test_kernels_are_compiled_ahead_where_they_are_tritons_and_there_is_a_device() -> None:
    assert config_of(spec_of(HYBRID), CUDA).kernels.ahead == 10.0
    assert config_of(spec_of(HYBRID), CUDA, compile_ahead=0).kernels.ahead == 0.0
    for hardware, asked in ((None, {}), (CUDA, {"attention_backend": "torch"})):
        assert config_of(spec_of(HYBRID), *([hardware] if hardware else []), **asked).kernels.ahead == 0.0
        found = resolved(spec_of(HYBRID), *([hardware] if hardware else []), compile_ahead=5, **asked)
        assert {d.what: d.value for d in found.decisions}["--compile-ahead"] == "ignored"
