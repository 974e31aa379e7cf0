"""Reads a `ModelSpec` from a Hugging Face `config.json`: one row per architecture, one reader per family.

What cannot be served exactly is refused by `ModelError`. A model with a `text_config`
(`...ForConditionalGeneration`) is read as its text part; images are refused where requests enter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tessera.core.errors import ModelError
from tessera.core.fields import DTYPES, Fields, read_rope
from tessera.core.quantization import Quantization, canonical
from tessera.core.spec import (
    MLP,
    AttentionSpec,
    DeltaSpec,
    DenseSpec,
    LayerSpec,
    Mixer,
    MLASpec,
    ModelSpec,
    MoESpec,
    MTPSpec,
    RouterSpec,
    SharedSpec,
)

Layers = tuple[tuple[LayerSpec, ...], MTPSpec | None]


def _attention(fields: Fields, qk_norm: bool, gated: bool = False, partial: float = 1.0) -> AttentionSpec:
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    default = fields.count("hidden_size") // heads
    head_dim = fields.count("head_dim", default)
    rope, _ = read_rope(fields, head_dim, partial=partial)
    return AttentionSpec(heads, kv_heads, head_dim, rope, qk_norm, gated)


def _dense(fields: Fields) -> DenseSpec:
    return DenseSpec(fields.count("intermediate_size"))


def _llama(fields: Fields) -> Layers:
    layer = LayerSpec(_attention(fields, qk_norm=False), _dense(fields))
    return (layer,) * fields.count("num_hidden_layers"), None


def _qwen3(fields: Fields) -> Layers:
    layer = LayerSpec(_attention(fields, qk_norm=True), _dense(fields))
    return (layer,) * fields.count("num_hidden_layers"), None


def _qwen_moe(fields: Fields, normalise: bool, shared: bool) -> MoESpec:
    experts = fields.count("num_experts", fields.get("num_local_experts"))  # transformers 5 writes the latter
    router = RouterSpec(experts, _top_k(fields, experts), normalise=normalise)
    gated = SharedSpec("shared_expert", fields.count("shared_expert_intermediate_size"), True) if shared else None
    return MoESpec(router, fields.count("moe_intermediate_size"), gated)


def _top_k(fields: Fields, experts: int) -> int:
    top_k = fields.count("num_experts_per_tok")
    if top_k > experts:
        raise fields.error("num_experts_per_tok", top_k, f"at most the {experts} experts")
    return top_k


def _sparse(fields: Fields, moe: MoESpec) -> Callable[[int], MLP]:
    """The MLP of layer i: sparse every `decoder_sparse_step` layers, but not in `mlp_only_layers`."""
    step, dense_only = fields.count("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])

    def mlp(i: int) -> MLP:
        return _dense(fields) if i in dense_only or (i + 1) % step else moe

    return mlp


def _qwen3_moe(fields: Fields) -> Layers:
    mlp = _sparse(fields, _qwen_moe(fields, fields.flag("norm_topk_prob", False), shared=False))
    attention = _attention(fields, qk_norm=True)
    return tuple(LayerSpec(attention, mlp(i)) for i in range(fields.count("num_hidden_layers"))), None


def _delta(fields: Fields, interleaved: bool) -> DeltaSpec:
    keys, values = fields.count("linear_num_key_heads", 16), fields.count("linear_num_value_heads", 32)
    if values % keys:
        raise fields.error("linear_num_key_heads", keys, f"a divisor of linear_num_value_heads {values}")
    return DeltaSpec(
        keys,
        values,
        fields.count("linear_key_head_dim", 128),
        fields.count("linear_value_head_dim", 128),
        fields.count("linear_conv_kernel_dim", 4, least=2),
        interleaved,
        fields.choice("mamba_ssm_dtype", DTYPES, "float32"),
    )


def _hybrid(fields: Fields, mlp: Callable[[int], MLP], interleaved: bool, drafts: int) -> Layers:
    """Delta-net layers with gated full attention in between (every fourth, unless `layer_types` says otherwise)."""
    count, interval = fields.count("num_hidden_layers"), fields.count("full_attention_interval", 4)
    kinds = fields.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)
    ]
    if len(kinds) != count:
        raise fields.error("layer_types", kinds, f"one entry for each of num_hidden_layers {count}")
    gated = fields.flag("attn_output_gate", True)
    attention = _attention(fields, qk_norm=True, gated=gated, partial=0.25)
    delta = _delta(fields, interleaved)
    mixers: dict[str, Mixer] = {"linear_attention": delta, "full_attention": attention}
    layers = tuple(LayerSpec(mixers[kind], mlp(i)) for i, kind in enumerate(kinds))
    # The MTP layer is one of full attention, with the MLP of a layer that is not special; it shares embedding and head.
    fields.choice("mtp_use_dedicated_embeddings", (False,), False)
    mtp = MTPSpec((LayerSpec(attention, mlp(count - 1)),) * drafts, "qwen") if drafts else None
    return layers, mtp


def _qwen3_5(fields: Fields) -> Layers:
    drafts = fields.count("mtp_num_hidden_layers", 0, least=0)
    return _hybrid(fields, lambda _: _dense(fields), False, drafts)


def _qwen3_5_moe(fields: Fields) -> Layers:
    moe = _qwen_moe(fields, normalise=True, shared=True)
    drafts = fields.count("mtp_num_hidden_layers", 0, least=0)
    return _hybrid(fields, lambda _: moe, False, drafts)


def _qwen3_next(fields: Fields) -> Layers:
    moe = _qwen_moe(fields, fields.flag("norm_topk_prob", True), shared=True)
    drafts = fields.count("num_nextn_predict_layers", 0, least=0)
    return _hybrid(fields, _sparse(fields, moe), True, drafts)


def _mla(fields: Fields) -> MLASpec:
    nope, rope_dim = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    rope, mscale = read_rope(fields, rope_dim, interleaved=fields.flag("rope_interleave", True))
    rank = fields.get("q_lora_rank")
    return MLASpec(
        num_heads=fields.count("num_attention_heads"),
        q_rank=None if rank is None else fields.count("q_lora_rank"),
        latent_dim=fields.count("kv_lora_rank"),
        nope_dim=nope,
        value_dim=fields.count("v_head_dim"),
        rope=rope,
        scale=float((nope + rope_dim) ** -0.5) * mscale,
    )


def _deepseek(fields: Fields, router: RouterSpec) -> Layers:
    fields.choice("moe_layer_freq", (1,), 1)
    width, shared = fields.count("moe_intermediate_size"), fields.count("n_shared_experts", 0, least=0)
    moe = MoESpec(router, width, SharedSpec("shared_experts", width * shared) if shared else None)
    dense, first = DenseSpec(fields.count("intermediate_size")), fields.count("first_k_dense_replace", 0, least=0)
    mla = _mla(fields)
    layers = tuple(LayerSpec(mla, dense if i < first else moe) for i in range(fields.count("num_hidden_layers")))
    drafts = fields.count("num_nextn_predict_layers", fields.get("num_mtp_layers", 0), least=0)
    return layers, MTPSpec((LayerSpec(mla, moe),) * drafts, "deepseek") if drafts else None


def _groups(fields: Fields, experts: int) -> tuple[int, int]:
    groups, best = fields.count("n_group", 1), fields.count("topk_group", 1)
    if experts % groups or best > groups:
        raise fields.error("n_group", (groups, best), f"a divisor of {experts} experts, and topk_group at most that")
    return groups, best


def _deepseek_v2(fields: Fields) -> Layers:
    fields.choice("scoring_func", ("softmax",), "softmax")
    fields.choice("norm_topk_prob", (False,), False)
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    experts = fields.count("n_routed_experts")
    groups, best = _groups(fields, experts) if method == "group_limited_greedy" else (1, 1)
    router = RouterSpec(
        experts,
        _top_k(fields, experts),
        normalise=False,
        scale=fields.number("routed_scaling_factor", 1.0),
        num_groups=groups,
        top_groups=best,
        wide=True,
    )
    return _deepseek(fields, router)


def _deepseek_v3(fields: Fields) -> Layers:
    fields.choice("scoring_func", ("sigmoid",), "sigmoid")
    fields.choice("topk_method", ("noaux_tc",), "noaux_tc")
    experts = fields.count("n_routed_experts")
    groups, best = _groups(fields, experts)
    router = RouterSpec(
        experts,
        _top_k(fields, experts),
        score="sigmoid",
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
        num_groups=groups,
        top_groups=best,
        group_score="top2",
        bias=True,
        wide=True,
    )
    return _deepseek(fields, router)


# Every architecture that this build serves: its family, and what reads its layers. Adding one is adding a row.
FAMILIES: dict[str, tuple[str, Callable[[Fields], Layers]]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
    "Qwen3NextForCausalLM": ("qwen3_next", _qwen3_next),
    "Qwen3_5ForCausalLM": ("qwen3_5", _qwen3_5),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", _qwen3_5),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", _qwen3_5_moe),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", _qwen3_5_moe),
    "DeepseekV2ForCausalLM": ("deepseek_v2", _deepseek_v2),
    "DeepseekV3ForCausalLM": ("deepseek_v3", _deepseek_v3),
}

# For a config.json without `architectures`.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def read_spec(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model that `config` (config.json) describes; `generation` is generation_config.json, where there is one.

    Raises `ModelError` for an unknown architecture and for every field whose value would change the answer.
    """
    architecture = _architecture(config)
    family, layers_of = FAMILIES[architecture]
    text = config.get("text_config")
    fields = Fields({**config, **text} if isinstance(text, Mapping) else config)
    if fields.get("tie_word_embeddings") is not None and isinstance(text, Mapping) and "tie_word_embeddings" in config:
        # The outer flag is the one that transformers ties by; the inner one repeats a default.
        fields = Fields({**fields.values, "tie_word_embeddings": config["tie_word_embeddings"]})
    _refuse_unserved(fields)
    layers, mtp = layers_of(fields)
    generation = generation or {}
    return ModelSpec(
        architecture=architecture,
        family=family,
        hidden=fields.count("hidden_size"),
        vocab_size=fields.count("vocab_size"),
        layers=layers,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_positions=fields.count("max_position_embeddings"),
        zero_centred=family in ("qwen3_5", "qwen3_next"),
        tied=fields.flag("tie_word_embeddings", False),
        dtype=fields.choice("dtype", DTYPES, fields.get("torch_dtype", "bfloat16")),
        eos=_tokens(generation.get("eos_token_id", fields.get("eos_token_id"))),
        mtp=mtp,
        quantization=_quantization(fields),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or []
    for name in named:
        if name in FAMILIES:
            return str(name)
    model_type = config.get("model_type")
    if not named and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    found = f"architectures {named!r} with model_type {model_type!r} is unknown"
    raise ModelError(
        f"config.json: {found if named or model_type else 'it names neither architectures nor a model_type'}; "
        f"this build serves: {', '.join(FAMILIES)}"
    )


def _tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)  # type: ignore[call-overload]


def _refuse_unserved(fields: Fields) -> None:
    """Fields that would change the answer in a way that no layer here knows."""
    fields.choice("hidden_act", ("silu",), "silu")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        fields.choice(name, (False,), False)
    fields.choice("pretraining_tp", (1,), 1)
    for kind in fields.get("layer_types", []):
        if kind not in ("full_attention", "linear_attention"):
            raise fields.error("layer_types", kind, "full_attention, linear_attention")


def _quantization(fields: Fields) -> Quantization | None:
    quantisation = fields.get("quantization_config")
    if quantisation is None:
        return None
    inner = Fields(quantisation, "config.json quantization_config")
    inner.choice("quant_method", ("fp8",))
    inner.choice("fmt", ("e4m3",), "e4m3")
    block = inner.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise inner.error("weight_block_size", block, "rows and columns of a block, for instance [128, 128]")
    inner.choice("activation_scheme", ("dynamic",), "dynamic")
    kept = inner.get("modules_to_not_convert", inner.get("ignored_layers", []))
    if not isinstance(kept, list | tuple) or not all(isinstance(name, str) for name in kept):
        raise inner.error("modules_to_not_convert", kept, "names of modules")
    return Quantization((block[0], block[1]), tuple(canonical(name) for name in kept))
