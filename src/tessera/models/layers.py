"""Mixers and dense MLPs, written once for every layout. T tokens, H heads, D head dim, R latent rank.

A layer takes local sizes from the layouts of its weights. Where it would wait on the wire it yields a handle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.comm.together import together
from tessera.comm.waits import Waits
from tessera.core.spec import AttentionSpec, DeltaSpec, MLASpec
from tessera.models.parts import Batch, Tools, Weights
from tessera.ops.fused import DeltaInputs, HeadInputs, LatentInputs, gated_mlp
from tessera.ops.linear import linear


class Attention:
    """Grouped query attention over paged keys and values; with a gate per element in Qwen3.5 and Qwen3-Next."""

    def __init__(self, spec: AttentionSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.spec, self.tools, self.pool = spec, tools, f"{name}.kv"
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut = cut = weights.slices("in")
        q_norm, k_norm = (weights.tensor(f"{s}_norm") if spec.qk_norm else None for s in ("q", "k"))
        tables, interleaved = tools.ropes[spec.rope], spec.rope.interleaved
        norms = (q_norm, k_norm, tools.eps, tools.zero_centred)
        self.inputs = HeadInputs(cut["q"], cut["k"], cut["v"], spec.head_dim, tables, interleaved, *norms)

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        backend, pool = self.tools.backend, batch.caches[self.pool]
        y = linear(x, self.w_in)
        q = backend.write_heads(y, self.inputs, pool, batch.segments)
        o = backend.paged_attention(q, pool, batch.segments, self.spec.scale).flatten(1)
        if self.spec.gated:
            o = backend.sigmoid_mul(o, y[:, self.cut["gate"]])
        return (yield self.tools.comm.sum([self.tools.part(o, self.w_out, "attn")], "attn", x.dtype))


class MLA:
    """Multi-head latent attention: a token caches a normed latent and one roped key (DeepSeek-V2, arXiv:2405.04434)."""

    def __init__(self, spec: MLASpec, weights: Weights, tools: Tools, name: str) -> None:
        self.spec, self.tools, self.pool = spec, tools, f"{name}.latent"
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut, self.heads = weights.slices("in"), weights.units("kv_up")["kv"]
        kv_up = weights.tensor("kv_up")
        self.kv_up = kv_up.view(self.heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        self.q_norm = weights.tensor("q_norm") if spec.q_rank is not None else None
        self.q_up = weights.linear("q_up") if spec.q_rank is not None else None
        tables, interleaved = tools.ropes[spec.rope], spec.rope.interleaved
        self.inputs = LatentInputs(self.cut["kv"], tables, interleaved, weights.tensor("kv_norm"), spec.norm_eps)

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        spec, pool = self.spec, batch.caches[self.pool]
        y = linear(x, self.w_in)
        q = self._queries(y).unflatten(1, (self.heads, spec.query_dim))
        q_rope = self.tools.backend.write_latents(y, q, self.inputs, pool, batch.segments)
        q_nope = q[..., : spec.nope_dim]
        o = self._attend(q_nope, q_rope, pool, batch).flatten(1)
        return (yield self.tools.comm.sum([self.tools.part(o, self.w_out, "attn")], "attn", x.dtype))

    def _queries(self, y: Tensor) -> Tensor:
        q = y[:, self.cut["q"]]
        if self.q_norm is None or self.q_up is None:
            return q
        return linear(self.tools.backend.rmsnorm(q, self.q_norm, self.spec.norm_eps), self.q_up)

    def _attend(self, q_nope: Tensor, q_rope: Tensor, pool: Tensor, batch: Batch) -> Tensor:
        """[T, H, value]: each run of segments in its form."""
        forms = {"absorbed": self.tools.backend.mla_absorbed, "expanded": self.tools.backend.mla_expanded}
        if len(batch.forms.mla) == 1:
            attend = forms[batch.forms.mla[0][2]]
            return attend(q_nope, q_rope, self.kv_up, pool, batch.segments, self.spec.scale)
        outs = [q_nope.new_empty(0, self.heads, self.spec.value_dim)]
        for first, last, form in batch.forms.mla:
            part, tokens = batch.segments.part(first, last), batch.segments.tokens_of(first, last)
            outs.append(forms[form](q_nope[tokens], q_rope[tokens], self.kv_up, pool, part, self.spec.scale))
        return torch.cat(outs)


class DeltaNet:
    """Gated delta net: a short causal convolution, then a state per value head (arXiv:2412.06464)."""

    def __init__(self, spec: DeltaSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.tools, self.name = tools, name
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        cut, heads, channels = weights.slices("in"), weights.units("in"), weights.slices("conv")
        self.inputs = DeltaInputs(
            mixed=slice(cut["q"].start, cut["v"].stop),
            z=cut["z"],
            b=cut["b"],
            a=cut["a"],
            channels=(channels["q"], channels["k"], channels["v"]),
            key_heads=heads["k"],
            value_heads=heads["v"],
            conv=weights.tensor("conv").squeeze(1),
            decay=-weights.tensor("A_log").exp(),
            dt_bias=weights.tensor("dt_bias"),
            norm=weights.tensor("norm"),
            eps=tools.eps,
        )

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        states = batch.caches[f"{self.name}.conv"], batch.caches[f"{self.name}.state"]
        y = linear(x, self.w_in)
        o = self.tools.backend.delta_net(y, self.inputs, *states, batch.segments, batch.forms.delta)
        return (yield self.tools.comm.sum([self.tools.part(o, self.w_out, "attn")], "attn", x.dtype))


class DenseMLP:
    """silu(gate(x)) * up(x), then down: cut over the ranks of the dense axis."""

    def __init__(self, weights: Weights, tools: Tools) -> None:
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.gated_product, self.wide = tools.backend.gated_product, tools.widens("dense")
        self.together = together(tools.comm, "dense")

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        x = yield from self.together.bring(x, batch.counts)
        part = gated_mlp(x, self.w_in, self.w_out, self.gated_product, self.wide)
        return (yield from self.together.home(part, batch.counts, x.dtype))
