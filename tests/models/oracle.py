"""Random tiny models of every family, saved by transformers, and its logits: the oracle of the parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
HYBRID = {**ATTENTION, **DELTA, "num_hidden_layers": 4}
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

# Per family: (name, model type, fields). Odd head counts, one KV head, tied embeddings, and what is peculiar to it.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-gqa", "llama", ATTENTION),
    ("llama-odd-one-kv-tied", "llama", {**ATTENTION, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama-llama3-rope", "llama", {**ATTENTION, "num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    ("llama-linear-rope", "llama", {**ATTENTION, "head_dim": None, "rope_parameters": _rope("linear", factor=3.0)}),
    ("qwen3-gqa", "qwen3", {**ATTENTION, "rope_parameters": _rope("default", 1e6)}),
    ("qwen3-odd-one-kv", "qwen3", {**ATTENTION, "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1}),
    ("qwen3-tied-yarn", "qwen3", {**ATTENTION, "tie_word_embeddings": True, "rope_parameters": YARN_PLAIN}),
    ("qwen3_moe-normalised", "qwen3_moe", {**ATTENTION, **MOE, "norm_topk_prob": True}),
    ("qwen3_moe-plain-dense-layer", "qwen3_moe", {**ATTENTION, **MOE, "num_hidden_layers": 3, "norm_topk_prob": False, "mlp_only_layers": [1]}),
    ("qwen3_moe-sparse-step-odd-tied", "qwen3_moe", {**ATTENTION, **MOE, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    ("qwen3_next", "qwen3_next", {**HYBRID, **MOE}),
    ("qwen3_next-odd-plain", "qwen3_next", {**HYBRID, **MOE, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "linear_num_key_heads": 3, "linear_num_value_heads": 3, "norm_topk_prob": False}),
    ("qwen3_next-dense-layers-tied", "qwen3_next", {**HYBRID, **MOE, "linear_num_key_heads": 1, "mlp_only_layers": [0, 3], "tie_word_embeddings": True, "linear_conv_kernel_dim": 3}),
    ("qwen3_5", "qwen3_5_text", HYBRID),
    ("qwen3_5-odd-one-kv", "qwen3_5_text", {**HYBRID, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "linear_num_key_heads": 3, "linear_num_value_heads": 9}),
    ("qwen3_5-tied-types", "qwen3_5_text", {**HYBRID, "num_hidden_layers": 3, "layer_types": [FULL, LINEAR, LINEAR], "tie_word_embeddings": True, "linear_num_key_heads": 1}),
    ("qwen3_5_moe", "qwen3_5_moe_text", {**HYBRID, **MOE}),
    ("qwen3_5_moe-odd-one-kv", "qwen3_5_moe_text", {**HYBRID, **MOE, "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 3}),
    ("qwen3_5_moe-tied-types", "qwen3_5_moe_text", {**HYBRID, **MOE, "num_hidden_layers": 3, "layer_types": [LINEAR, FULL, LINEAR], "tie_word_embeddings": True, "num_experts": 5}),
    ("deepseek_v2-greedy-yarn", "deepseek_v2", {**MLA, "rope_parameters": YARN}),
    ("deepseek_v2-groups", "deepseek_v2", {**MLA, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    ("deepseek_v2-tied-all-sparse", "deepseek_v2", {**MLA, "num_attention_heads": 2, "first_k_dense_replace": 0, "tie_word_embeddings": True, "n_shared_experts": 1}),
    ("deepseek_v3-yarn", "deepseek_v3", {**V3, "rope_parameters": YARN}),
    ("deepseek_v3-plain-weights", "deepseek_v3", {**V3, "norm_topk_prob": False, "first_k_dense_replace": 2, "hidden_size": 60, "num_attention_heads": 3}),
    ("deepseek_v3-no-q-rank-tied", "deepseek_v3", {**V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True}),
]  # fmt: skip


def make_model(model_type: str, fields: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model: matrices well above the usual spread, so that gates and routers matter, and norms that differ."""
    config = AutoConfig.for_model(model_type, **{"attn_implementation": "eager", **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "e_score_correction_bias" in name:
                weight.normal_(0, 0.2)
            elif name.endswith(("A_log", "dt_bias")) or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
            else:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[T, V] of one prefill."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]
