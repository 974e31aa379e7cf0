"""Mixers and dense MLPs, written once for every layout. T tokens, H heads, D head dim, R latent rank.

A layer takes local sizes from the layouts of its weights. Where it would wait on the wire it yields a handle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tessera.comm.together import together
from tessera.comm.waits import Waits
from tessera.core.spec import AttentionSpec, DeltaSpec, MLASpec
from tessera.models.parts import Batch, Tools, Weights
from tessera.ops.attention import write_kv
from tessera.ops.linear import linear
from tessera.ops.mla import write_latent
from tessera.ops.norm import gated_rmsnorm, rmsnorm
from tessera.ops.precision import wide
from tessera.ops.rope import rotate
from tessera.ops.segments import Segments


class Attention:
    """Grouped query attention over paged keys and values; with a gate per element in Qwen3.5 and Qwen3-Next."""

    def __init__(self, spec: AttentionSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.spec, self.tools, self.pool = spec, tools, f"{name}.kv"
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut, self.heads = weights.slices("in"), weights.units("in")
        self.norms = {s: weights.tensor(f"{s}_norm") for s in ("q", "k")} if spec.qk_norm else {}

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        tools, pool = self.tools, batch.caches[self.pool]
        y = linear(x, self.w_in)
        cos_sin = batch.rotation(self.spec.rope, tools.ropes[self.spec.rope])
        q, k, v = (self._heads(y, s) for s in ("q", "k", "v"))
        q, k = (rotate(self._normed(h, s), *cos_sin, self.spec.rope.interleaved) for h, s in ((q, "q"), (k, "k")))
        write_kv(pool, k, v, batch.segments)
        o = tools.backend.paged_attention(q, pool, batch.segments, self.spec.scale).flatten(1)
        if self.spec.gated:
            o = o * y[:, self.cut["gate"]].sigmoid()
        return (yield tools.comm.sum([linear(o, self.w_out)], "attn"))

    def _heads(self, y: Tensor, section: str) -> Tensor:
        """[T, H, D] of one section."""
        return y[:, self.cut[section]].unflatten(1, (self.heads[section], self.spec.head_dim))

    def _normed(self, h: Tensor, section: str) -> Tensor:
        if not self.spec.qk_norm:
            return h
        return rmsnorm(h, self.norms[section], self.tools.eps, self.tools.zero_centred)


class MLA:
    """Multi-head latent attention: a token caches a normed latent and one roped key (DeepSeek-V2, arXiv:2405.04434)."""

    def __init__(self, spec: MLASpec, weights: Weights, tools: Tools, name: str) -> None:
        self.spec, self.tools, self.pool = spec, tools, f"{name}.latent"
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut, self.heads = weights.slices("in"), weights.units("kv_up")["kv"]
        self.kv_norm = weights.tensor("kv_norm")
        kv_up = weights.tensor("kv_up")
        self.kv_up = kv_up.view(self.heads, spec.nope_dim + spec.value_dim, spec.latent_dim)
        self.q_norm = weights.tensor("q_norm") if spec.q_rank is not None else None
        self.q_up = weights.linear("q_up") if spec.q_rank is not None else None

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        spec, pool = self.spec, batch.caches[self.pool]
        y = linear(x, self.w_in)
        cos_sin = batch.rotation(spec.rope, self.tools.ropes[spec.rope])
        latent, key = y[:, self.cut["kv"]].split((spec.latent_dim, spec.rope.dim), -1)
        key = rotate(key[:, None], *cos_sin, spec.rope.interleaved)[:, 0]
        write_latent(pool, rmsnorm(latent, self.kv_norm, spec.norm_eps), key, batch.segments)
        q = self._queries(y).unflatten(1, (self.heads, spec.query_dim))
        q_nope, q_rope = q.split((spec.nope_dim, spec.rope.dim), -1)
        q_rope = rotate(q_rope, *cos_sin, spec.rope.interleaved)
        o = self._attend(q_nope, q_rope, pool, batch).flatten(1)
        return (yield self.tools.comm.sum([linear(o, self.w_out)], "attn"))

    def _queries(self, y: Tensor) -> Tensor:
        q = y[:, self.cut["q"]]
        if self.q_norm is None or self.q_up is None:
            return q
        return linear(rmsnorm(q, self.q_norm, self.spec.norm_eps), self.q_up)

    def _attend(self, q_nope: Tensor, q_rope: Tensor, pool: Tensor, batch: Batch) -> Tensor:
        """[T, H, value]: each run of segments in its form."""
        outs = []
        for first, last, form in batch.forms.mla:
            part, tokens = batch.segments.part(first, last), batch.segments.tokens_of(first, last)
            attend = self._absorbed if form == "absorbed" else self._expanded
            outs.append(attend(q_nope[tokens], q_rope[tokens], pool, part))
        return outs[0] if len(outs) == 1 else torch.cat([q_nope.new_empty(0, self.heads, self.spec.value_dim), *outs])

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, pool: Tensor, part: Segments) -> Tensor:
        w_k, w_v = self.kv_up.split((self.spec.nope_dim, self.spec.value_dim), 1)
        q_latent = torch.einsum("thn,hnr->thr", q_nope, w_k)
        o = self.tools.backend.mla_absorbed(q_latent, q_rope, pool, part, self.spec.scale)
        return torch.einsum("thr,hvr->thv", o, w_v)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, pool: Tensor, part: Segments) -> Tensor:
        out: Tensor = self.tools.backend.mla_expanded(q_nope, q_rope, self.kv_up, pool, part, self.spec.scale)
        return out


class DeltaNet:
    """Gated delta net: a short causal convolution, then a state per value head (arXiv:2412.06464)."""

    def __init__(self, spec: DeltaSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.spec, self.tools, self.name = spec, tools, name
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut, self.heads = weights.slices("in"), weights.units("in")
        self.channels = slice(self.cut["q"].start, self.cut["v"].stop)
        self.conv = weights.tensor("conv").squeeze(1)
        self.channel_cut = weights.slices("conv")
        self.decay, self.dt_bias = -weights.tensor("A_log").exp(), weights.tensor("dt_bias")
        self.norm = weights.tensor("norm")

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        backend, segments = self.tools.backend, batch.segments
        conv_state, state = batch.caches[f"{self.name}.conv"], batch.caches[f"{self.name}.state"]
        y = linear(x, self.w_in)
        mixed = backend.causal_conv(y[:, self.channels], self.conv, conv_state, segments)
        q, k, v = (self._heads(mixed[:, self.channel_cut[s]], s) for s in ("q", "k", "v"))
        beta = y[:, self.cut["b"]].sigmoid()
        a = y[:, self.cut["a"]]
        g = self.decay * softplus(a.to(wide(a.dtype)) + self.dt_bias)
        o = backend.gated_delta_rule(q, k, v, g, beta, state, segments, batch.forms.delta)
        o = gated_rmsnorm(o, self._heads(y[:, self.cut["z"]], "z"), self.norm, self.tools.eps)
        return (yield self.tools.comm.sum([linear(o.flatten(1), self.w_out)], "attn"))

    def _heads(self, y: Tensor, section: str) -> Tensor:
        """[T, H, D] of the columns of one section."""
        return y.unflatten(1, (self.heads[section], -1))


class GatedMLP:
    """silu(gate(x)) * up(x), then down: this rank's part of the sum."""

    def __init__(self, weights: Weights) -> None:
        self.w_in, self.w_out = weights.linear("in"), weights.linear("out")
        self.cut = weights.slices("in")

    def part(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> the rank's part of [T, hidden]."""
        y = linear(x, self.w_in)
        return linear(silu(y[:, self.cut["gate"]]) * y[:, self.cut["up"]], self.w_out)


class DenseMLP:
    """A gated MLP cut over the ranks of the dense axis."""

    def __init__(self, weights: Weights, tools: Tools) -> None:
        self.mlp, self.together = GatedMLP(weights), together(tools.comm, "dense")

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        x = yield from self.together.bring(x, batch.counts)
        return (yield from self.together.home(self.mlp.part(x), batch.counts))
