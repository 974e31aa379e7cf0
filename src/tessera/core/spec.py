"""What a model is: a declared list of layers, as pure data. `core/families.py` reads it from a `config.json`.

Everything that differs between families is a field here; nothing below asks for a model's name. Numbers are those of
the whole model; what a rank holds follows from the layouts that `core/tensors.py` derives from this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tessera.core.quantization import Quantization

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `dim` elements of a head (RoFormer, arXiv:2104.09864).

    `interleaved`: rotates pairs (0, 1), (2, 3), ... (DeepSeek); else pairs (i, i + dim / 2). `table_scale` multiplies
    cos and sin (yarn's attention factor, arXiv:2309.00071). The remaining fields belong to the kinds named beside them.
    """

    dim: int
    theta: float
    kind: RopeKind = "default"
    interleaved: bool = False
    table_scale: float = 1.0
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the correction range is rounded to whole dims
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Grouped query attention. `gated`: q_proj also yields a gate per element, sigmoid(gate) scales the output."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qk_norm: bool = False
    gated: bool = False

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). `q_rank` None: queries are not compressed.

    `latent_dim` + `rope.dim` elements per token are cached, shared by all heads. `scale` includes yarn's mscale^2.
    """

    num_heads: int
    q_rank: int | None
    latent_dim: int
    nope_dim: int
    value_dim: int
    rope: RopeSpec
    scale: float
    norm_eps: float = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says

    @property
    def query_dim(self) -> int:
        """Elements of one head's query: nope | rope."""
        return self.nope_dim + self.rope.dim


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """Gated delta net (arXiv:2412.06464). Each key head serves `num_value_heads / num_key_heads` value heads.

    `interleaved`: the checkpoint keeps in_proj_qkvz and in_proj_ba per key head (Qwen3-Next) instead of qkv, z, b, a.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    interleaved: bool = False
    state_dtype: str = "float32"

    @property
    def group(self) -> int:
        """Value heads of one key head."""
        return self.num_value_heads // self.num_key_heads


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """silu(gate(x)) * up(x), then down."""

    intermediate: int


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How tokens choose experts.

    `score`: softmax or sigmoid of the router's logits. With `num_groups` > 1 only experts of the best `top_groups`
    groups may be chosen; a group scores by its best expert ("max", DeepSeek-V2) or by the sum of its best two
    ("top2", V3).
    `bias`: a correction is added to the scores for the choice only. `normalise`: weights are divided by their sum.
    `scale` multiplies them. `wide`: the router's product is in fp32 or wider, else in the model's dtype.
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class SharedSpec:
    """An expert that every token visits. `name` in the checkpoint; `gated`: scaled by sigmoid(<name>_gate(x))."""

    name: str
    intermediate: int
    gated: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """Routed experts of `intermediate` each, plus a shared one."""

    router: RouterSpec
    intermediate: int
    shared: SharedSpec | None = None


Mixer = AttentionSpec | MLASpec | DeltaSpec
MLP = DenseSpec | MoESpec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x += mixer(norm(x)); x += mlp(norm(x))."""

    mixer: Mixer
    mlp: MLP


@dataclass(frozen=True, slots=True)
class MTPSpec:
    """Multi-token prediction head: layers that draft further tokens.

    `style` "qwen": tensors under `mtp.`; "deepseek": each layer stored after the last of the model, with its own norms.
    """

    layers: tuple[LayerSpec, ...]
    style: Literal["qwen", "deepseek"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model. `zero_centred`: RMSNorm scales by (1 + w). `eos`: tokens that end a sequence, from the checkpoint.

    `quantization`: of the checkpoint's weights (fp8 with `weight_scale_inv`), None when they are not quantised.
    """

    architecture: str
    family: str
    hidden: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_positions: int
    zero_centred: bool = False
    tied: bool = False
    dtype: str = "bfloat16"
    eos: tuple[int, ...] = ()
    mtp: MTPSpec | None = None
    quantization: Quantization | None = None

    @property
    def recurrent(self) -> bool:
        """True when some layer keeps a state per sequence (a slot) besides pages per token."""
        return any(isinstance(layer.mixer, DeltaSpec) for layer in self.layers)

    @property
    def paged(self) -> bool:
        """True when some layer keeps pages per token."""
        return any(not isinstance(layer.mixer, DeltaSpec) for layer in self.layers)

    @property
    def latent(self) -> bool:
        """True when some layer attends to latents (MLA)."""
        return any(isinstance(layer.mixer, MLASpec) for layer in self.layers)
