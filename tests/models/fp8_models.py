"""Models whose dims are whole groups of 16 on up to four ranks, quantised in blocks of 32 x 16 and the like."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from models.configs import DELTA, FULL, LINEAR, MLA
from models.layouts import Outcome, compute, differences
from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.spec import ModelSpec
from tessera.core.weights import weight_table
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.models.quantizing import Quantizing
from tessera.models.source import Source

BLOCK = (32, 16)  # rows of two heads: a rank that has one cuts blocks
COMMON: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64, "dtype": "float64",
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
DELTAS = {
    **DELTA, "layer_types": [LINEAR, FULL], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
LATENT = {
    **MLA, "qk_nope_head_dim": 24, "v_head_dim": 16, "moe_intermediate_size": 64, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 2,
    "intermediate_size": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": {**MOE, **DELTAS},
    "qwen3_5_moe_text": {**MOE, **DELTAS},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "norm_topk_prob": False},
    "deepseek_v3": {**LATENT, "q_lora_rank": 48, "norm_topk_prob": True, "n_group": 1, "topk_group": 1},
}
# (tp, dp, ep, dense TP, dp-lm-head, all-to-all)
Layout = tuple[int, int, int, int, bool, bool]
LAYOUTS: list[Layout] = [
    (2, 1, 1, 2, False, False), (4, 1, 1, 4, False, False), (4, 1, 2, 2, False, False), (4, 2, 4, 4, False, True),
]  # fmt: skip


@lru_cache(maxsize=8)
def quantised_model(family: str) -> tuple[ModelSpec, Source]:
    """The model and its random weights in fp8."""
    spec = read_spec({**COMMON, **MODELS[family], "model_type": family})
    assert spec.quantization is not None
    noise = Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 3)
    return spec, Quantizing(noise, spec.quantization)


@lru_cache(maxsize=2)
def alone(family: str) -> Outcome:
    """What one rank computes."""
    return compute(Alone(), *quantised_model(family))


def compare(comm: Comm, family: str) -> dict[str, float]:
    """Computes on one rank of a mesh: the largest differences from one rank alone."""
    spec, source = quantised_model(family)
    return differences(spec, compute(comm, spec, source), alone(family), comm)
