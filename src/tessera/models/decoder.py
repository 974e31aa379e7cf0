"""The one decoder loop. T tokens, N positions that need logits, V vocabulary, G parts of it, W tokens of a part.

A layer is a generator that yields handles where it waits on the wire; `comm/waits.py` runs one batch alone, or two side
by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tessera.comm.together import Together, together
from tessera.comm.waits import Waits, drain
from tessera.core.spec import AttentionSpec, DeltaSpec, DenseSpec, LayerSpec, MLASpec, ModelSpec
from tessera.models.experts import MoE
from tessera.models.forms import choose_forms
from tessera.models.layers import MLA, Attention, DeltaNet, DenseMLP
from tessera.models.parts import Batch, Tools, Weights
from tessera.ops.greedy import whole
from tessera.ops.linear import PackedLinear, linear
from tessera.ops.precision import wide
from tessera.ops.segments import Segments
from tessera.ops.tied import Ends

MIXERS: dict[type, Callable[..., Attention | MLA | DeltaNet]] = {
    AttentionSpec: Attention,
    MLASpec: MLA,
    DeltaSpec: DeltaNet,
}


class Layer:
    """x += mixer(norm(x)); x += mlp(norm(x)). The last sum is left to who norms x next: one kernel may do both."""

    def __init__(self, spec: LayerSpec, weights: Weights, tools: Tools, name: str) -> None:
        self.tools = tools
        self.mixer_norm, self.mlp_norm = weights.tensor("mixer_norm"), weights.tensor("mlp_norm")
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, weights.at("mixer"), tools, name)
        mlp = weights.at("mlp")
        self.mlp = DenseMLP(mlp, tools) if isinstance(spec.mlp, DenseSpec) else MoE(spec.mlp, mlp, tools)

    def __call__(self, x: Tensor, added: Tensor | None, batch: Batch) -> Waits[tuple[Tensor, Tensor]]:
        """x [T, hidden], and what is still to be added to it -> the same of what comes out."""
        normed, x = self.tools.added_norm(x, added, self.mixer_norm)
        mixed = yield from self.mixer(normed, batch)
        normed, x = self.tools.added_norm(x, mixed, self.mlp_norm)
        return x, (yield from self.mlp(normed, batch))


class Embedding:
    """Rows of the vocabulary that this rank holds; the others' rows come in by a sum."""

    def __init__(self, weights: Weights, rows: Callable[[Tensor], Tensor], vocabulary: Together) -> None:
        self.rows, self.together = rows, vocabulary
        held = weights.held("embed")
        self.first, self.count = held[0], len(held)

    def __call__(self, tokens: Tensor, counts: tuple[int, ...]) -> Waits[Tensor]:
        """tokens [T] -> [T, hidden]."""
        local = (yield from self.together.bring(tokens, counts)) - self.first
        outside = (local < 0) | (local >= self.count)
        part = self.rows(local.clamp(0, self.count - 1)).masked_fill(outside[:, None], 0)
        return (yield from self.together.home(part, counts, part.dtype))


class Head:
    """Logits of the part of the vocabulary that this rank holds; the others' come in by a gather."""

    def __init__(self, weight: PackedLinear, vocabulary: Together, tools: Tools) -> None:
        self.weight, self.together, self.comm = weight, vocabulary, tools.comm

    def __call__(self, hidden: Tensor, counts: tuple[int, ...]) -> Waits[Tensor]:
        """hidden [N, hidden] -> [N, G, W] in order of tokens, the padding of the vocabulary last."""
        part = linear((yield from self.together.bring(hidden, counts)), self.weight)
        mine = yield from self.together.own(part, counts)  # [attention groups, N, V of one rank]
        ones = [1] * self.comm.mesh.size_of("vocab/attn")
        found = yield self.comm.gather(mine.movedim(0, 1)[:, :, None], "vocab/attn", 2, ones)
        return found.flatten(1, 2)


class Decoder:
    """A model on one rank. Built by `models/build.py`.

    `counts`: how many rows every DP rank of the instance has in this step; this one's alone where it is the only one.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, tools: Tools, ends: Ends) -> None:
        self.spec, self.tools = spec, tools
        vocabulary = together(tools.comm, "vocab")
        self.embed = Embedding(weights, ends.rows, vocabulary)
        self.head = Head(ends.head, vocabulary, tools)
        self.layers = [
            Layer(layer, weights.at(f"layers.{i}"), tools, f"layers.{i}") for i, layer in enumerate(spec.layers)
        ]
        self.norm = weights.tensor("norm")

    def hidden(
        self,
        tokens: Tensor,
        segments: Segments,
        caches: Mapping[str, Tensor],
        counts: tuple[int, ...] | None = None,
        largest: int = 0,
    ) -> Waits[Tensor]:
        """tokens [T] of the step's ranges -> [T, hidden] after the final norm. Writes keys, values and states.

        `largest`: see `Batch`, if others run beside this.
        """
        known = self._counts(counts, len(tokens))
        batch = Batch(segments, caches, choose_forms(segments), known, largest or sum(known))
        x, added = (yield from self.embed(tokens, batch.counts)), None
        for layer in self.layers:
            x, added = yield from layer(x, added, batch)
        normed, _ = self.tools.added_norm(x, added, self.norm)
        return normed

    def logits(self, hidden: Tensor, counts: tuple[int, ...] | None = None) -> Tensor:
        """hidden [N, hidden] -> [N, V] in fp32 or wider. The padding of the vocabulary is cut off."""
        logits = whole(self.narrow_logits(hidden, counts), self.spec.vocab_size)
        return logits.to(wide(logits.dtype))

    def narrow_logits(self, hidden: Tensor, counts: tuple[int, ...] | None = None) -> Tensor:
        """`logits` as they come together, [N, G, W] in the model's dtype: enough for the likeliest, which stays the
        same."""
        return drain(self.head(hidden, self._counts(counts, len(hidden))))

    def _counts(self, counts: tuple[int, ...] | None, mine: int) -> tuple[int, ...]:
        comm = self.tools.comm
        found = (mine,) if counts is None else counts
        assert len(found) == comm.mesh.size_of("dp"), f"{found} for {comm.mesh.size_of('dp')} DP ranks"
        assert found[comm.mesh.coordinate(comm.rank, "dp")] == mine, f"{mine} rows where {found} were announced"
        return found
