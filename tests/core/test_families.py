"""A config.json is read exactly, in the spellings that checkpoints have, or refused by the name of its field."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.core.errors import ModelError
from tessera.core.families import FAMILIES, read_spec
from tessera.core.mesh import instance_mesh
from tessera.core.quantization import Quantization
from tessera.core.spec import AttentionSpec, DeltaSpec, DenseSpec, MLASpec, ModelSpec, MoESpec
from tessera.core.weights import weight_bytes, weight_table

Config = dict[str, Any]

QWEN3_MOE: Config = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False, "sliding_window": None,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 151645,
}  # fmt: skip
LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "intermediate_size": 18432, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "vocab_size": 129280,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
QWEN3_NEXT: Config = {
    "architectures": ["Qwen3NextForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "partial_rotary_factor": 0.25, "rope_theta": 10000000, "vocab_size": 151936, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
TEXT = {key: value for key, value in QWEN3_NEXT.items() if key not in ("architectures", "rope_theta", "torch_dtype")}
QWEN3_5: Config = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": False,
    "image_token_id": 248056, "vision_config": {"depth": 27, "hidden_size": 1152},
    "text_config": {**TEXT, "dtype": "bfloat16", "num_experts": 256, "num_experts_per_tok": 8, "eos_token_id": 248044,
                    "mtp_num_hidden_layers": 1, "attn_output_gate": True, "mamba_ssm_dtype": "float32",
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25,
                                        "mrope_section": [11, 11, 10], "mrope_interleaved": True}},
}  # fmt: skip


def test_llama() -> None:
    spec = read_spec(LLAMA)
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, AttentionSpec)
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim, mixer.qk_norm) == (32, 8, 128, False)
    rope = mixer.rope
    assert (rope.kind, rope.factor, rope.original_max_positions, rope.theta) == ("llama3", 8.0, 8192, 500000.0)
    assert spec.eos == (128001, 128008, 128009)
    assert (spec.recurrent, spec.zero_centred, spec.norm_eps) == (False, False, 1e-5)


def test_qwen3_moe_in_both_spellings() -> None:
    spec = read_spec(QWEN3_MOE)
    moe = spec.layers[7].mlp
    assert isinstance(moe, MoESpec)
    assert (moe.router.num_experts, moe.router.top_k, moe.router.normalise, moe.shared) == (128, 8, True, None)
    later = {
        name: value for name, value in QWEN3_MOE.items() if name not in ("num_experts", "rope_theta", "rope_scaling")
    }
    later |= {"num_local_experts": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert read_spec(later) == spec


def test_deepseek_v3() -> None:
    spec = read_spec(DEEPSEEK_V3)
    mixer, moe = spec.layers[0].mixer, spec.layers[3].mlp
    assert isinstance(mixer, MLASpec)
    assert isinstance(spec.layers[2].mlp, DenseSpec)
    assert isinstance(moe, MoESpec)
    assert mixer.scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)
    assert mixer.rope.interleaved
    assert mixer.rope.table_scale == 1.0
    router = moe.router
    assert (router.score, router.bias, router.num_groups, router.top_groups, router.scale) == (
        "sigmoid",
        True,
        8,
        4,
        2.5,
    )
    assert spec.mtp is not None
    assert spec.mtp.style == "deepseek"
    assert spec.quantization == Quantization((128, 128))
    assert weight_bytes(weight_table(spec, instance_mesh()), instance_mesh(), 0, "bfloat16") // 10**9 == 1342


def test_hybrids() -> None:
    later, older = read_spec(QWEN3_5), read_spec(QWEN3_NEXT)
    for spec in (later, older):
        assert [type(layer.mixer) for layer in spec.layers[:4]] == [DeltaSpec] * 3 + [AttentionSpec]
        assert (spec.recurrent, spec.paged, spec.zero_centred) == (True, True, True)
        attention = spec.layers[3].mixer
        assert isinstance(attention, AttentionSpec)
        assert (attention.rope.dim, attention.gated, attention.rope.theta) == (64, True, 1e7)
    deltas = [spec.layers[0].mixer for spec in (later, older)]
    assert [d.interleaved for d in deltas if isinstance(d, DeltaSpec)] == [False, True]
    assert later.mtp is not None
    assert later.mtp.style == "qwen"
    assert later.eos == (248044,)
    assert older.mtp is None


def test_hybrids_rotate_a_quarter_unless_told_otherwise() -> None:
    bare = {name: value for name, value in QWEN3_NEXT.items() if name != "partial_rotary_factor"}
    for config, dim in ((bare, 64), ({**bare, "partial_rotary_factor": 0.5}, 128)):
        attention = read_spec(config).layers[3].mixer
        assert isinstance(attention, AttentionSpec)
        assert attention.rope.dim == dim


def test_generation_config_says_which_tokens_end_a_sequence() -> None:
    assert read_spec(QWEN3_MOE, {"eos_token_id": [151645, 151643]}).eos == (151645, 151643)
    assert read_spec(QWEN3_MOE, {"temperature": 0.6}).eos == (151645,)


REFUSED: list[tuple[Config, Config, str]] = [
    (QWEN3_MOE, {"architectures": ["GPT2LMHeadModel"]}, "this build serves: LlamaForCausalLM"),
    (QWEN3_MOE, {"attention_bias": True}, "attention_bias"),
    (QWEN3_MOE, {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN3_MOE, {"hidden_act": "gelu"}, "hidden_act"),
    (QWEN3_MOE, {"layer_types": ["sliding_attention"] * 48}, "layer_types"),
    (QWEN3_MOE, {"num_key_value_heads": 5}, "num_key_value_heads"),
    (QWEN3_MOE, {"num_experts_per_tok": 129}, "num_experts_per_tok"),
    (QWEN3_MOE, {"num_experts": None}, "num_experts"),
    (QWEN3_MOE, {"hidden_size": "2048"}, "hidden_size"),
    (QWEN3_MOE, {"vocab_size": True}, "vocab_size"),
    (QWEN3_MOE, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    (QWEN3_MOE, {"torch_dtype": "int8"}, "dtype"),
    (QWEN3_MOE, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    (QWEN3_MOE, {"quantization_config": {"quant_method": "awq"}}, "quant_method"),
    (QWEN3_MOE, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
    (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func"),
    (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
    (DEEPSEEK_V3, {"n_group": 7}, "n_group"),
    (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
    (QWEN3_NEXT, {"linear_num_key_heads": 5}, "linear_num_key_heads"),
    (QWEN3_NEXT, {"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    (QWEN3_NEXT, {"layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("config", "change", "named"), REFUSED, ids=[f"{n}-{i}" for i, (*_, n) in enumerate(REFUSED)])
def test_what_would_change_the_answer_is_refused_by_name(config: Config, change: Config, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_spec({**config, **change})


@pytest.mark.parametrize(
    "config", [QWEN3_MOE, LLAMA, DEEPSEEK_V3, QWEN3_NEXT, QWEN3_5], ids=lambda c: c["architectures"][0]
)
def test_ranks_hold_what_one_rank_does(config: Config) -> None:
    """No part of a large matrix is held twice, or by nobody, when it is cut."""
    spec = read_spec(config)
    one = _bytes(spec, 1)
    assert one == _bytes(spec, 1, tp=1)
    for tp, ep in ((2, 1), (4, 4), (16, 8)):
        parts = _bytes(spec, tp, tp=tp, ep=ep)
        # Norms, routers, latent projections and replicated KV heads are on several ranks; all else is on one.
        assert one <= parts < one * 1.06


def _bytes(spec: ModelSpec, ranks: int, **sizes: int) -> int:
    mesh = instance_mesh(**sizes)
    table = weight_table(spec, mesh)
    return sum(weight_bytes(table, mesh, rank, "bfloat16") for rank in range(ranks))


def test_every_architecture_has_its_family() -> None:
    assert {family for family, _ in FAMILIES.values()} == {
        "llama", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "deepseek_v2", "deepseek_v3",
    }  # fmt: skip
