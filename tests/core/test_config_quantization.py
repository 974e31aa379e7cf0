"""Promise: which weights are in fp8, and what multiplies them, is told; what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from core.test_config import CPU, CUDA, DENSE, config_of, decided, refusals, resolved, spec_of
from core.test_families import DEEPSEEK_V3, QWEN3_5
from tessera.core.config import Hardware
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.quantization import Quantization
from tessera.core.weights import weight_bytes, weight_table

STORED = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MODEL = {**DENSE, "hidden_size": 512, "intermediate_size": 1408, "head_dim": 128, "num_attention_heads": 4}
QWEN_FP8 = {
    **STORED, "activation_scheme": "dynamic", "fmt": "e4m3",
    "modules_to_not_convert": [
        "lm_head", "model.language_model.embed_tokens", "model.language_model.layers.0.linear_attn.in_proj_a",
        "model.language_model.layers.0.linear_attn.in_proj_b", "model.language_model.layers.0.mlp.gate",
        "model.language_model.layers.0.mlp.shared_expert_gate", "model.visual.blocks.0.attn.proj", "mtp.fc",
    ],
}  # fmt: skip


def fp8(**changes: Any) -> Any:
    return spec_of(MODEL, **{"quantization_config": STORED, **changes})


@pytest.mark.parametrize(
    ("hardware", "chosen", "why"),
    [
        (CPU, "dequantize", "faster than those of"),
        (CUDA, "triton", "half the bytes"),
        (replace(CUDA, capability=(8, 0)), "dequantize", "8.0 has no products of e4m3"),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"quantization": "fp8"}])
def test_auto_is_what_the_device_is_good_for_and_says_why(
    hardware: Hardware, chosen: str, why: str, asked: dict[str, Any]
) -> None:
    result = resolved(fp8(), hardware, **asked)
    assert decided(result, "fp8-gemm-backend").value == chosen
    assert why in decided(result, "fp8-gemm-backend").why
    assert "as the checkpoint has them" in decided(result, "quantization").why
    found, products = result.config.model.quantization, result.config.kernels.fp8
    assert (found, products) == (
        Quantization(dequantized=chosen == "dequantize"),
        "" if chosen == "dequantize" else chosen,
    )


def test_a_plain_checkpoint_is_quantised_while_it_is_loaded_and_weighs_half() -> None:
    plain, result = config_of(spec_of(MODEL), CUDA), resolved(spec_of(MODEL), CUDA, quantization="fp8")
    assert result.config.model.quantization == Quantization(loading=True)
    assert "while they are loaded" in decided(result, "quantization").why
    ends = 2 * 512 * 512  # the tied embedding, in bf16 either way
    assert result.config.memory.weight_bytes - ends < 0.51 * (plain.memory.weight_bytes - ends)
    dequantised = config_of(spec_of(MODEL), CUDA, quantization="fp8", fp8_gemm_backend="dequantize")
    assert dequantised.memory.weight_bytes == plain.memory.weight_bytes
    assert config_of(fp8(), CUDA, load_format="dummy").model.quantization == Quantization(loading=True)


def test_it_is_shown_as_plain_data() -> None:
    shown = config_of(fp8(), CUDA).public()["model"]["quantization"]
    assert shown == {"block": (128, 128), "kept": (), "loading": False, "dequantized": False}


def test_nothing_is_quantised_that_nobody_asked_for() -> None:
    result = resolved(spec_of(MODEL), CUDA, fp8_gemm_backend="triton")
    assert (result.config.model.quantization, result.config.kernels.fp8) == (None, "")
    assert decided(result, "--fp8-gemm-backend").value == "ignored"


def test_products_that_a_device_or_a_dtype_does_not_have_are_refused() -> None:
    assert "cpu has no products" in refusals(fp8(), CPU, fp8_gemm_backend="triton")[0]
    assert "8.0 has no" in refusals(fp8(), replace(CUDA, capability=(8, 0)), fp8_gemm_backend="triton")[0]
    assert "float64" in refusals(fp8(), CUDA, fp8_gemm_backend="triton", dtype="float64")[0]
    odd = fp8(quantization_config={**STORED, "weight_block_size": [128, 100]})
    assert "128x100" in refusals(odd, CUDA, fp8_gemm_backend="triton")[0]
    assert config_of(fp8(), CPU, fp8_gemm_backend="torch").kernels.fp8 == "torch"


def test_ranks_that_cut_a_group_of_activations_are_refused_and_those_that_cut_blocks_of_rows_are_not() -> None:
    """1408 are 11 groups of 128, so one rank or 11 take the product that comes down from them."""
    two = replace(CUDA, count=2)
    (text,) = refusals(fp8(), two, tp=2)
    assert "cuts a group of 128" in text
    assert "Use --tp-size 1" in text
    assert config_of(fp8(), two, tp=2, fp8_gemm_backend="dequantize").mesh.tp == 2
    # Heads of 128: their rows are whole blocks; keys of 2 heads on 2 ranks too.
    assert config_of(fp8(intermediate_size=1536), two, tp=2).mesh.tp == 2


def test_other_groups_of_the_same_ranks_are_named_where_they_do() -> None:
    """Experts of 1408 whole, and a dense layer of 10944 too."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1408, "norm_topk_prob": True}
    spec = fp8(architectures=["Qwen3MoeForCausalLM"], intermediate_size=10944, mlp_only_layers=[0], **moe)
    two = replace(CUDA, count=2)
    text = refusals(spec, two, tp=2)
    assert len(text) == 2
    assert all(t.endswith("Or, with 2 ranks, --ep-size 2 and --moe-dense-tp-size 1.") for t in text)
    assert config_of(spec, two, tp=2, ep=2, moe_dense_tp_size=1).mesh.tp == 2
    (text,) = refusals(spec, two, tp=2, ep=2)
    assert text.endswith("Or, with 2 ranks, --moe-dense-tp-size 1.")


EQUIPPED = replace(CUDA, libraries=("deep_gemm",))
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "norm_topk_prob": True, "mlp_only_layers": [0],
}  # fmt: skip


def test_deep_gemm_multiplies_experts_too_unless_others_are_asked_for() -> None:
    found = resolved(fp8(**MOE), EQUIPPED, fp8_gemm_backend="deep_gemm")
    assert (found.config.kernels.fp8, found.config.kernels.moe) == ("deep_gemm", "deep_gemm")
    assert decided(found, "moe-runner-backend").why == "with --fp8-gemm-backend deep_gemm"
    assert found.config.kernels.graphs[0]
    mixed = {"fp8_gemm_backend": "deep_gemm", "moe_runner_backend": "triton"}
    assert config_of(fp8(**MOE), EQUIPPED, **mixed).kernels.moe == "triton"
    alone = config_of(fp8(**MOE), EQUIPPED, moe_runner_backend="deep_gemm").kernels
    assert (alone.fp8, alone.moe) == ("triton", "deep_gemm")


def test_parts_of_sums_stay_wide_with_weights_in_fp8() -> None:
    wide = {"parts_dtype": "float32"}
    assert config_of(fp8(**MOE), CUDA, **wide).kernels.wide.rows
    found = resolved(
        fp8(**MOE), replace(EQUIPPED, count=2), tp=2, moe_dense_tp_size=1, fp8_gemm_backend="deep_gemm", **wide
    )
    assert (found.config.kernels.wide.rows, found.config.kernels.moe) == (True, "triton")
    ours = decided(found, "triton's products instead of DeepGEMM's")
    assert (ours.value, ours.why) == ("layers.*.mixer.out (2)", "its products give bfloat16")
    (text,) = refusals(fp8(**MOE), EQUIPPED, moe_runner_backend="deep_gemm", **wide)
    assert text.startswith("--parts-dtype float32 with --moe-runner-backend deep_gemm: its products give bfloat16")


def test_experts_in_bf16_that_deep_gemm_does_not_multiply_are_refused() -> None:
    """Known fault: the first long step ended the engine ("k % 64 == 0"). Cut over ranks they may not fit any more."""
    asked = {"moe_runner_backend": "deep_gemm", "quantization": None}
    fits, odd = (spec_of({**DENSE, **MOE, "hidden_size": 64}, moe_intermediate_size=n) for n in (128, 48))
    assert config_of(fits, EQUIPPED, **asked).kernels.moe == "deep_gemm"
    for spec, ranks in ((odd, 1), (fits, 4)):
        (text,) = refusals(spec, replace(EQUIPPED, count=4), tp=ranks, **asked)
        assert "--moe-runner-backend deep_gemm: its products take columns in 64s, layers." in text


def test_weights_that_deep_gemm_does_not_multiply_are_named() -> None:
    """10944 rows are 85.5 blocks, so gate | up has scales every 64, as experts of 192 have. What comes down from these
    would fit, but goes the way of what goes up."""
    what = "triton's products instead of DeepGEMM's"
    found = resolved(fp8(**MOE, intermediate_size=10944), EQUIPPED, fp8_gemm_backend="deep_gemm")
    assert decided(found, what).value == "layers.*.mlp.in (1)"
    assert decided(found, what).why == "it takes blocks of 128x128, found 64x128"
    fits = resolved(fp8(**MOE), EQUIPPED, fp8_gemm_backend="deep_gemm")
    assert what not in {d.what for d in fits.decisions}
    narrow = fp8(**{**MOE, "moe_intermediate_size": 192})
    (text,) = refusals(narrow, EQUIPPED, moe_runner_backend="deep_gemm")
    assert "--moe-runner-backend deep_gemm with the weights in fp8: it takes blocks of 128x128, found 64x128" in text


@pytest.mark.parametrize(
    ("hardware", "asked", "why"),
    [
        (CUDA, {}, "pip install 'tessera-llm[deep-gemm]'"),
        (replace(EQUIPPED, capability=(8, 9)), {}, "needs compute capability 9.0"),
        (replace(EQUIPPED, capability=(10, 0)), {}, "powers of two"),
        (EQUIPPED, {"dtype": "float16"}, "the model is in float16"),
        (CPU, {}, "need a CUDA device"),
    ],
)
def test_deep_gemm_is_refused_where_it_does_not_run(hardware: Hardware, asked: dict[str, Any], why: str) -> None:
    (text,) = refusals(fp8(), hardware, fp8_gemm_backend="deep_gemm", **asked)
    assert why in text
    odd = fp8(quantization_config={**STORED, "weight_block_size": [64, 64]})
    assert any("found 64x64" in text for text in refusals(odd, EQUIPPED, fp8_gemm_backend="deep_gemm"))


def test_kernels_that_read_the_host_do_not_run_as_graphs() -> None:
    assert config_of(fp8(), CUDA).kernels.graphs[0]
    assert config_of(fp8(), CUDA, fp8_gemm_backend="torch").kernels.graphs == ((), (), ())


def test_what_published_checkpoints_keep_is_kept() -> None:
    spec = read_spec({**QWEN3_5, "quantization_config": QWEN_FP8})
    assert spec.quantization is not None
    table = {t.name: t for t in weight_table(spec, SINGLE, quantization=spec.quantization)}
    assert table["layers.0.mixer.in"].plain == ("b", "a")
    assert [p.block for p in table["layers.0.mixer.in"].parts()] == [(128, 128), None]
    for name in ("layers.0.mixer.out", "layers.3.mixer.in", "layers.3.mixer.out", "layers.5.mlp.experts_in",
                 "layers.5.mlp.experts_out", "layers.5.mlp.shared.in", "layers.5.mlp.shared.out"):  # fmt: skip
        assert (table[name].block, table[name].plain) == ((128, 128), ())
    for name in ("embed", "head", "layers.0.mlp.router", "layers.0.mlp.shared.gate", "layers.0.mixer.conv"):
        assert table[name].block is None
    deepseek = read_spec(DEEPSEEK_V3)
    table = {t.name: t for t in weight_table(deepseek, SINGLE, quantization=deepseek.quantization)}
    assert table["layers.0.mixer.kv_up"].block is None
    assert table["layers.0.mixer.in"].block == table["layers.0.mixer.q_up"].block == (128, 128)


def test_deepseek_v3_weighs_what_its_files_do() -> None:
    """688.6 GB with the draft layer, of which it is 14."""
    spec = read_spec(DEEPSEEK_V3)
    table = weight_table(spec, SINGLE, quantization=spec.quantization)
    assert 673e9 < weight_bytes(table, SINGLE, 0, "bfloat16") < 676e9


@pytest.mark.parametrize(
    ("kept", "covered"),
    [
        ((), True),
        (("model.layers.3.mlp.down_proj",), False),
        (("down_proj",), False),
        (("model.layers.3.mlp",), False),
        (("model.layers.3",), False),
        (("model.layers.30", "mlp.down", "layers.3.mlp.gate", "lp.down_proj"), True),
    ],
)
def test_names_of_modules_end_at_dots(kept: tuple[str, ...], covered: bool) -> None:
    assert Quantization(kept=kept).covers("model.layers.3.mlp.down_proj.weight") == covered


def test_a_module_kept_in_one_layer_is_kept_there_alone() -> None:
    about = {**STORED, "modules_to_not_convert": ["model.layers.1.mlp"]}
    spec = fp8(quantization_config=about)
    table = {t.name: t for t in weight_table(spec, SINGLE, quantization=spec.quantization)}
    assert table["layers.1.mlp.in"].block is None
    assert table["layers.0.mlp.in"].block == table["layers.1.mixer.in"].block == (128, 128)
    assert "cuts a group" in refusals(spec, replace(CUDA, count=2), tp=2)[0]  # the other layer
