"""The one decoder loop. T tokens, N positions that need logits, V vocabulary.

A layer is a generator that yields handles where it waits on the wire; `drain` runs one batch alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import embedding

from tessera.core.spec import AttentionSpec, DenseSpec, LayerSpec, MLASpec, ModelSpec
from tessera.models.experts import MoE
from tessera.models.forms import choose_forms
from tessera.models.layers import MLA, Attention, DeltaNet, DenseMLP
from tessera.models.parts import Batch, Tools, Waits, Weights
from tessera.ops.linear import PackedLinear, linear
from tessera.ops.norm import add_rmsnorm, rmsnorm
from tessera.ops.precision import wide
from tessera.ops.segments import Segments


class Layer:
    """x += mixer(norm(x)); x += mlp(norm(x))."""

    def __init__(self, spec: LayerSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.tools = tools
        self.mixer_norm, self.mlp_norm = weights.tensor("mixer_norm"), weights.tensor("mlp_norm")
        mixer = weights.at("mixer")
        self.mixer: Attention | MLA | DeltaNet
        if isinstance(spec.mixer, AttentionSpec):
            self.mixer = Attention(spec.mixer, mixer, tools, name)
        elif isinstance(spec.mixer, MLASpec):
            self.mixer = MLA(spec.mixer, mixer, tools, name)
        else:
            self.mixer = DeltaNet(spec.mixer, mixer, tools, name)
        mlp = weights.at("mlp")
        self.mlp = DenseMLP(mlp, tools) if isinstance(spec.mlp, DenseSpec) else MoE(spec.mlp, mlp, tools)

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        eps, zero_centred = self.tools.eps, self.tools.zero_centred
        mixed = yield from self.mixer(rmsnorm(x, self.mixer_norm, eps, zero_centred), batch)
        normed, x = add_rmsnorm(mixed, x, self.mlp_norm, eps, zero_centred)
        return x + (yield from self.mlp(normed))


class Embedding:
    """Rows of the vocabulary that this rank holds; the others' rows come in by a sum."""

    def __init__(self, weights: Weights, tools: Tools) -> None:
        self.weight, self.tools = weights.tensor("embed"), tools
        held = weights.held("embed")
        self.first, self.count = held[0], len(held)

    def __call__(self, tokens: Tensor) -> Waits[Tensor]:
        """tokens [T] -> [T, hidden]."""
        local = tokens - self.first
        outside = (local < 0) | (local >= self.count)
        part = embedding(local.clamp(0, self.count - 1), self.weight).masked_fill(outside[:, None], 0)
        return (yield self.tools.comm.sum([part], "attn"))


class Decoder:
    """A model on one rank. Built by `models/build.py`."""

    def __init__(self, spec: ModelSpec, weights: Weights, tools: Tools, head: PackedLinear) -> None:
        self.spec, self.tools, self.head = spec, tools, head
        self.embed = Embedding(weights, tools)
        self.layers = [
            Layer(layer, weights.at(f"layers.{i}"), tools, f"layers.{i}") for i, layer in enumerate(spec.layers)
        ]
        self.norm = weights.tensor("norm")

    def hidden(self, tokens: Tensor, segments: Segments, caches: Mapping[str, Tensor]) -> Waits[Tensor]:
        """tokens [T] of the step's ranges -> [T, hidden] after the final norm. Writes keys, values and states."""
        batch = Batch(segments, caches, choose_forms(segments))
        x = yield from self.embed(tokens)
        for layer in self.layers:
            x = yield from layer(x, batch)
        return rmsnorm(x, self.norm, self.tools.eps, self.tools.zero_centred)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden] -> [N, V] in fp32 or wider. The padding of the vocabulary is cut off."""
        part = linear(hidden, self.head)
        whole = self.tools.comm.gather(part.to(wide(part.dtype)), "attn", -1).wait()
        return whole[:, : self.spec.vocab_size]
