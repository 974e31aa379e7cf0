"""The weight table: every weight at run time, how it is cut, and where the checkpoint keeps each section of it.

Fused tensors (`q | gate | k | v`, `gate | up`, `q | k | v | z | b | a`) are sections from several checkpoint tensors.
Mesh axes: heads on "attn", dense MLPs on "dense", experts on "expert" and inside an expert on "moe", shared experts on
"shared" (all ranks, so that one sum adds routed and shared parts; or one), vocabulary on "vocab". A dim that feeds a
sum across ranks is `summed`. Names in a checkpoint are the canonical `model.layers.N....`; `models/load.py` maps others
to them.
"""

from __future__ import annotations

from typing import Literal

from tessera.core.layout import Dim, Layout, Section, Stored, padded, whole
from tessera.core.mesh import Mesh
from tessera.core.quantization import Quantization
from tessera.core.scales import check_blocks, in_blocks, tile_bytes
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
    SharedSpec,
)
from tessera.core.tensors import TensorSpec, conv_channels, wide_dtype


def weight_table(
    spec: ModelSpec, mesh: Mesh, mtp: bool = False, quantization: Quantization | None = None
) -> tuple[TensorSpec, ...]:
    """Every weight at run time, in the order of use. Raises `LayoutError` when one cannot be laid out on `mesh`.

    With tied embeddings there is no "head". `mtp`: the draft layers too. `quantization`: of the weights, if they are.
    """
    table = [_vocabulary("embed", "model.embed_tokens.weight", "embedding", spec, mesh)]
    for i, layer in enumerate(spec.layers):
        table += _layer(f"layers.{i}", f"model.layers.{i}", layer, spec.hidden)
    table.append(_vector("norm", "model.norm.weight", spec.hidden))
    if not spec.tied:
        table.append(_vocabulary("head", "lm_head.weight", "linear", spec, mesh))
    if mtp and spec.mtp is not None:
        table += _mtp(spec, spec.mtp)
    if quantization is not None and not quantization.dequantized:
        table = [in_blocks(tensor, quantization) for tensor in table]
    for tensor in table:
        tensor.layout.check(mesh)
        check_blocks(tensor, mesh)
    return tuple(table)


def weight_bytes(table: tuple[TensorSpec, ...], mesh: Mesh, rank: int, dtype: str) -> int:
    """Bytes of all weights of a rank in a model run in `dtype`."""
    return sum(tile_bytes(t, mesh, rank, wide_dtype(dtype) if t.wide else dtype) for t in table)


def _from(name: str, tensor: str, length: int) -> Dim:
    """A dim that every rank holds whole, read from `tensor`."""
    return Dim(name, (Section(name, 1, length, stored=Stored(tensor)),))


def _vector(name: str, tensor: str, length: int) -> TensorSpec:
    return TensorSpec(name, Layout((_from("hidden", tensor, length),)))


def _linear(name: str, rows: Dim, columns: Dim, wide: bool = False) -> TensorSpec:
    return TensorSpec(name, Layout((rows, columns)), "linear", wide)


def _row_parallel(name: str, tensor: str, what: str, units: int, width: int, axis: str, hidden: int) -> TensorSpec:
    """A weight [hidden, units * width] whose outputs are summed over `axis`."""
    columns = Dim(what, (Section(what, units, width, stored=Stored(tensor)),), axis, summed=True)
    return _linear(name, whole("hidden", hidden), columns)


def _vocabulary(
    name: str, tensor: str, role: Literal["linear", "embedding"], spec: ModelSpec, mesh: Mesh
) -> TensorSpec:
    units, padding = padded(spec.vocab_size, mesh.size_of("vocab"))
    rows = Dim("vocabulary", (Section("vocabulary", units, padding=padding, stored=Stored(tensor)),), "vocab")
    return TensorSpec(name, Layout((rows, whole("hidden", spec.hidden))), role)


def _layer(name: str, stored: str, layer: LayerSpec, hidden: int) -> list[TensorSpec]:
    return [
        _vector(f"{name}.mixer_norm", f"{stored}.input_layernorm.weight", hidden),
        *_mixer(f"{name}.mixer", stored, layer.mixer, hidden),
        _vector(f"{name}.mlp_norm", f"{stored}.post_attention_layernorm.weight", hidden),
        *_mlp(f"{name}.mlp", f"{stored}.mlp", layer.mlp, hidden),
    ]


def _mixer(name: str, stored: str, mixer: Mixer, hidden: int) -> list[TensorSpec]:
    if isinstance(mixer, AttentionSpec):
        return _attention(name, f"{stored}.self_attn", mixer, hidden)
    if isinstance(mixer, MLASpec):
        return _mla(name, f"{stored}.self_attn", mixer, hidden)
    return _delta(name, f"{stored}.linear_attn", mixer, hidden)


def _attention(name: str, stored: str, a: AttentionSpec, hidden: int) -> list[TensorSpec]:
    q = f"{stored}.q_proj.weight"
    stride = a.head_dim * (2 if a.gated else 1)  # a gated q_proj keeps each head's query and gate side by side
    sections = [Section("q", a.num_heads, a.head_dim, stored=Stored(q, 0, stride))]
    if a.gated:
        sections.append(Section("gate", a.num_heads, a.head_dim, stored=Stored(q, a.head_dim, stride)))
    sections += [
        Section(s, a.num_kv_heads, a.head_dim, leaders=a.num_heads, stored=Stored(f"{stored}.{s}_proj.weight"))
        for s in ("k", "v")
    ]
    table = [_linear(f"{name}.in", Dim("heads", tuple(sections), "attn"), whole("hidden", hidden))]
    if a.qk_norm:
        table += [_vector(f"{name}.{s}_norm", f"{stored}.{s}_norm.weight", a.head_dim) for s in ("q", "k")]
    out = _row_parallel(f"{name}.out", f"{stored}.o_proj.weight", "heads", a.num_heads, a.head_dim, "attn", hidden)
    return [*table, out]


def _mla(name: str, stored: str, m: MLASpec, hidden: int) -> list[TensorSpec]:
    kv_a, cached = f"{stored}.kv_a_proj_with_mqa.weight", m.latent_dim + m.rope.dim
    heads = m.num_heads
    if m.q_rank is None:
        q = Section("q", heads, m.query_dim, stored=Stored(f"{stored}.q_proj.weight"))
        kv = Section("kv", 1, cached, leaders=heads, stored=Stored(kv_a))  # whole on every rank
        table = [_linear(f"{name}.in", Dim("rows", (q, kv), "attn"), whole("hidden", hidden))]
    else:
        q = Section("q", 1, m.q_rank, stored=Stored(f"{stored}.q_a_proj.weight"))
        kv = Section("kv", 1, cached, stored=Stored(kv_a))
        up = Section("q", heads, m.query_dim, stored=Stored(f"{stored}.q_b_proj.weight"))
        table = [
            _linear(f"{name}.in", Dim("rows", (q, kv)), whole("hidden", hidden)),
            _vector(f"{name}.q_norm", f"{stored}.q_a_layernorm.weight", m.q_rank),
            _linear(f"{name}.q_up", Dim("heads", (up,), "attn"), whole("rank", m.q_rank)),
        ]
    kv_up = Section("kv", heads, m.nope_dim + m.value_dim, stored=Stored(f"{stored}.kv_b_proj.weight"))
    return [
        *table,
        _vector(f"{name}.kv_norm", f"{stored}.kv_a_layernorm.weight", m.latent_dim),
        # "plain": used whole per head (absorbed form) as well as by a product, so it is not packed.
        TensorSpec(f"{name}.kv_up", Layout((Dim("heads", (kv_up,), "attn"), whole("latent", m.latent_dim)))),
        _row_parallel(f"{name}.out", f"{stored}.o_proj.weight", "heads", heads, m.value_dim, "attn", hidden),
    ]


def _projected(d: DeltaSpec, stored: str) -> tuple[Section, ...]:
    """The sections q | k | v | z | b | a of the fused input projection."""
    nv, dk, dv = d.num_value_heads, d.key_dim, d.value_dim
    if not d.interleaved:
        one = {s: Stored(f"{stored}.in_proj_{s}.weight") for s in ("z", "b", "a")}
        z, b, a = Section("z", nv, dv, stored=one["z"]), *(Section(s, nv, 1, stored=one[s]) for s in ("b", "a"))
        return (*conv_channels(d, f"{stored}.in_proj_qkv.weight"), z, b, a)
    # Per key head: q | k | v of its value heads | z of them; and b of them | a of them.
    qkvz, ba, group = f"{stored}.in_proj_qkvz.weight", f"{stored}.in_proj_ba.weight", d.group
    stride, values = 2 * dk + 2 * group * dv, group * dv
    return (
        Section("q", d.num_key_heads, dk, leaders=nv, stored=Stored(qkvz, 0, stride)),
        Section("k", d.num_key_heads, dk, leaders=nv, stored=Stored(qkvz, dk, stride)),
        Section("v", nv, dv, stored=Stored(qkvz, 2 * dk, stride, group)),
        Section("z", nv, dv, stored=Stored(qkvz, 2 * dk + values, stride, group)),
        Section("b", nv, 1, stored=Stored(ba, 0, 2 * group, group)),
        Section("a", nv, 1, stored=Stored(ba, group, 2 * group, group)),
    )


def _delta(name: str, stored: str, d: DeltaSpec, hidden: int) -> list[TensorSpec]:
    conv = Layout(
        (
            Dim("channels", conv_channels(d, f"{stored}.conv1d.weight"), "attn"),
            whole("one", 1),
            whole("kernel", d.kernel),
        )
    )
    per_head = {s: Section("heads", d.num_value_heads, stored=Stored(f"{stored}.{s}")) for s in ("A_log", "dt_bias")}
    return [
        _linear(f"{name}.in", Dim("rows", _projected(d, stored), "attn"), whole("hidden", hidden)),
        TensorSpec(f"{name}.conv", conv),
        *(
            TensorSpec(f"{name}.{s}", Layout((Dim("heads", (section,), "attn"),)), wide=True)
            for s, section in per_head.items()
        ),
        _vector(f"{name}.norm", f"{stored}.norm.weight", d.value_dim),
        _row_parallel(
            f"{name}.out", f"{stored}.out_proj.weight", "heads", d.num_value_heads, d.value_dim, "attn", hidden
        ),
    ]


def _mlp(name: str, stored: str, mlp: MLP, hidden: int) -> list[TensorSpec]:
    if isinstance(mlp, DenseSpec):
        return _gated_mlp(name, stored, mlp.intermediate, "dense", hidden)
    return _moe(name, stored, mlp, hidden)


def _gate_up(stored: str, intermediate: int, axis: str) -> Dim:
    sections = (Section(s, intermediate, stored=Stored(f"{stored}.{s}_proj.weight")) for s in ("gate", "up"))
    return Dim("intermediate", tuple(sections), axis)


def _gated_mlp(name: str, stored: str, intermediate: int, axis: str, hidden: int) -> list[TensorSpec]:
    return [
        _linear(f"{name}.in", _gate_up(stored, intermediate, axis), whole("hidden", hidden)),
        _row_parallel(f"{name}.out", f"{stored}.down_proj.weight", "intermediate", intermediate, 1, axis, hidden),
    ]


def _moe(name: str, stored: str, moe: MoESpec, hidden: int) -> list[TensorSpec]:
    router, inner = moe.router, moe.intermediate
    # Summed: an expert that two ranks held would be added twice.
    experts = Dim("expert", (Section("expert", router.num_experts),), "expert", summed=True, indexed=True)
    one = f"{stored}.experts.{{expert}}"
    down = Section("intermediate", inner, stored=Stored(f"{one}.down_proj.weight"))
    columns = Dim("intermediate", (down,), "moe", summed=True)
    rows = _from("experts", f"{stored}.gate.weight", router.num_experts)
    table = [_linear(f"{name}.router", rows, whole("hidden", hidden), wide=router.wide)]
    if router.bias:
        bias = _from("experts", f"{stored}.gate.e_score_correction_bias", router.num_experts)
        table.append(TensorSpec(f"{name}.router_bias", Layout((bias,)), wide=True))
    expert_in = Layout((experts, _gate_up(one, inner, "moe"), whole("hidden", hidden)))
    table.append(TensorSpec(f"{name}.experts_in", expert_in, "experts"))
    table.append(TensorSpec(f"{name}.experts_out", Layout((experts, whole("hidden", hidden), columns)), "experts"))
    return table + (_shared(f"{name}.shared", stored, moe.shared, hidden) if moe.shared else [])


def _shared(name: str, stored: str, shared: SharedSpec, hidden: int) -> list[TensorSpec]:
    table = _gated_mlp(name, f"{stored}.{shared.name}", shared.intermediate, "shared", hidden)
    if shared.gated:
        gate = _from("gate", f"{stored}.{shared.name}_gate.weight", 1)
        table.append(_linear(f"{name}.gate", gate, whole("hidden", hidden)))
    return table


def _mtp(spec: ModelSpec, mtp: MTPSpec) -> list[TensorSpec]:
    """Draft layers: norms of embedding and hidden state, the product that joins them, a layer, a final norm."""
    table: list[TensorSpec] = []
    for i, layer in enumerate(mtp.layers):
        last = f"model.layers.{len(spec.layers) + i}"
        if mtp.style == "qwen":
            names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm", f"mtp.layers.{i}")
        else:
            names = (f"{last}.enorm", f"{last}.hnorm", f"{last}.eh_proj", f"{last}.shared_head.norm", last)
        embedding, hidden, join, final, inner = names
        table += [
            _vector(f"mtp.{i}.embedding_norm", f"{embedding}.weight", spec.hidden),
            _vector(f"mtp.{i}.hidden_norm", f"{hidden}.weight", spec.hidden),
            _linear(f"mtp.{i}.join", _from("hidden", f"{join}.weight", spec.hidden), whole("both", 2 * spec.hidden)),
            *_layer(f"mtp.{i}", inner, layer, spec.hidden),
            _vector(f"mtp.{i}.norm", f"{final}.weight", spec.hidden),
        ]
    return table
