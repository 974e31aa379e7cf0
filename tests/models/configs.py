"""Tiny configurations of every family, as a config.json would have them."""

from __future__ import annotations

from typing import Any

Case = tuple[str, str, dict[str, Any]]  # name, model type, fields

COMMON = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
ATTENTION = {**COMMON, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 40,
}
# A delta net's output is normed: where it is near 0 a small eps would blow rounding up beyond any tolerance.
HYBRID = {**ATTENTION, **DELTA, "num_hidden_layers": 4, "rms_norm_eps": 1e-3}
FULL, LINEAR = "full_attention", "linear_attention"
MLA = {
    **COMMON,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
V3 = {
    **MLA,
    "num_key_value_heads": None,
    "q_lora_rank": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}


def _rope(kind: str, theta: float = 10000.0, **more: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope(
    "yarn",
    factor=40.0,
    beta_fast=32,
    beta_slow=1,
    mscale=0.707,
    mscale_all_dim=0.5,
    original_max_position_embeddings=32,
)
YARN_PLAIN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)

ODD = {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1}
FIVE = {**ODD, "num_attention_heads": 5}
THREE = {"num_hidden_layers": 3}
TIED = {"tie_word_embeddings": True}
EPS = {"rms_norm_eps": 1e-4}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def _family(model_type: str, base: dict[str, Any], cases: dict[str, dict[str, Any]]) -> list[Case]:
    return [(f"{model_type}-{name}", model_type, {**base, **fields}) for name, fields in cases.items()]


# Per family: odd head counts, one KV head, tied embeddings, and what is peculiar to it.
CASES: list[Case] = [
    *_family(
        "llama",
        ATTENTION,
        {
            "gqa": EPS,
            "odd-one-kv-tied": {**ODD, **TIED},
            "llama3-rope": {"num_key_value_heads": 4, "rope_parameters": LLAMA3},
            "linear-rope": {"head_dim": None, "rope_parameters": _rope("linear", factor=3.0)},
        },
    ),
    *_family(
        "qwen3",
        ATTENTION,
        {
            "gqa": {"rope_parameters": _rope("default", 1e6)},
            "odd-one-kv": {**FIVE, **EPS},
            "tied-yarn": {**TIED, "rope_parameters": YARN_PLAIN},
        },
    ),
    *_family(
        "qwen3_moe",
        {**ATTENTION, **MOE},
        {
            "normalised": {"norm_topk_prob": True},
            "plain-dense-layer": {"num_hidden_layers": 3, "norm_topk_prob": False, "mlp_only_layers": [1]},
            "sparse-step-odd-tied": {**ODD, **TIED, "decoder_sparse_step": 2},
        },
    ),
    *_family(
        "qwen3_next",
        {**HYBRID, **MOE},
        {
            "usual": {},
            "odd-plain": {**ODD, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "norm_topk_prob": False},
            "dense-tied": {**TIED, "linear_num_key_heads": 1, "mlp_only_layers": [0, 3], "linear_conv_kernel_dim": 3},
        },
    ),
    *_family(
        "qwen3_5_text",
        HYBRID,
        {
            "usual": {},
            "odd-one-kv": {**ODD, "linear_num_key_heads": 3, "linear_num_value_heads": 9},
            "tied-types": {**TIED, "layer_types": [FULL, LINEAR, LINEAR], **THREE, "linear_num_key_heads": 1},
        },
    ),
    *_family(
        "qwen3_5_moe_text",
        {**HYBRID, **MOE},
        {
            "usual": {},
            "odd-one-kv": {**FIVE, "linear_num_key_heads": 1, "linear_num_value_heads": 3},
            "tied-types": {**TIED, "layer_types": [LINEAR, FULL, LINEAR], **THREE, "num_experts": 5},
        },
    ),
    *_family(
        "deepseek_v2",
        MLA,
        {
            "greedy-yarn": {**EPS, "rope_parameters": YARN},
            "groups": {**GROUPS, "q_lora_rank": 24, "topk_method": "group_limited_greedy"},
            "tied-all-sparse": {**TIED, "num_attention_heads": 2, "first_k_dense_replace": 0, "n_shared_experts": 1},
        },
    ),
    *_family(
        "deepseek_v3",
        V3,
        {
            "yarn": {"rope_parameters": YARN},
            "plain-weights-odd": {
                "norm_topk_prob": False,
                "first_k_dense_replace": 2,
                "hidden_size": 60,
                "num_attention_heads": 3,
            },
            "no-q-rank-tied": {**TIED, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        },
    ),
]
