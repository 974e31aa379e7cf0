"""Bytes of what the layers of a step hold at once, at most, counted from the shapes of a rank's weights.

T tokens of a DP rank, A of all DP ranks together, H hidden, k experts a token, b bytes of an activation. While a layer
runs, the sum and the addend that came in are still held by whoever called it (see `decoder.py`), and its own are made
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tessera.core.config.needs import Sketch
from tessera.core.spec import AttentionSpec, DeltaSpec, DenseSpec, MLASpec, MoESpec
from tessera.ops.delta_forms import CHUNK
from tessera.ops.linear import WIDENED

Shapes = Mapping[str, tuple[int, ...]]

CARRIED = 5  # [T, H]: sum and addend that came in, the layer's own sum, its norm, what the mixer made
PIECES = 64 << 20  # partial results of keys in splits: as many as fill the chip
EXPANDED = 1 << 30  # most bytes of latents gathered and the keys and values made of them (`triton_mla.py`)
SHORT = 8  # tokens of a range up to which its keys are attended in splits (`triton_latent.py`)
FRAGMENTS = 1.1  # what the allocator holds for what is asked


@dataclass(frozen=True, slots=True)
class _Step:
    """A step: `own` T and `everyone` A tokens, of at most `rows` ranges, which `earlier` tokens may precede."""

    sketch: Sketch
    own: int
    everyone: int
    rows: int
    earlier: int

    @property
    def hidden(self) -> int:
        """H."""
        return self.sketch.spec.hidden


def step_bytes(sketch: Sketch) -> int:
    """Of the largest step, on the rank that holds most."""
    return _bytes(sketch, sketch.tokens, sketch.rows * sketch.context)


def recorded_bytes(sketch: Sketch, tokens: int) -> int:
    """Of a step of `tokens` tokens a DP rank that runs as a graph, which expands latents of its own tokens only."""
    return _bytes(sketch, tokens, 0)


def _bytes(sketch: Sketch, own: int, earlier: int) -> int:
    kinds = tuple(dict.fromkeys(sketch.spec.layers))  # the shapes of a hundred layers take a second for sixteen ranks
    sketch = replace(sketch, spec=replace(sketch.spec, layers=kinds))
    step = _Step(sketch, own, own * sketch.mesh.size_of("dp"), min(sketch.rows, own), earlier)
    return max(_of_rank(step, sketch.shapes(rank)) for rank in range(sketch.mesh.size))


def _of_rank(step: _Step, shapes: Shapes) -> int:
    carried, most = CARRIED * step.own * step.hidden * step.sketch.element, 0
    for i, layer in enumerate(step.sketch.spec.layers):
        for part, spec in (("mixer", layer.mixer), ("mlp", layer.mlp)):
            most = max(most, _PARTS[type(spec)](step, _under(shapes, f"layers.{i}.{part}."), spec))
    return int((carried + most) * FRAGMENTS) + PIECES


def _under(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _narrow(step: _Step, *widest: int) -> int:
    """Bytes of rows of A tokens that are quantised for a product."""
    return step.everyone * max(widest) * (2 if step.sketch.kernels.fp8 else 0)


def _wide(step: _Step, elements: int, inputs: int) -> int:
    """Bytes that so many elements of parts of sums take more than those of activations, and copies of what goes into
    their products, where those take wide numbers only (`linear.widened`)."""
    kernels, more = step.sketch.kernels, max(4 - step.sketch.element, 0)
    if not kernels.wide.sums or not more:
        return 0
    return elements * more + (4 * (inputs + WIDENED) if kernels.attention == "torch" else 0)


def _attention(step: _Step, shapes: Shapes, spec: AttentionSpec) -> int:
    """The projection; queries, what was attended, the same gated; their product and its sum over ranks."""
    into, out = shapes["in"][0], shapes["out"][1]
    made = step.own * (into + 3 * out + 2 * step.hidden) * step.sketch.element
    return made + _wide(step, step.own * step.hidden, step.own * out) + _narrow(step, out, step.hidden)


def _latent(step: _Step, shapes: Shapes, spec: MLASpec) -> int:
    """Besides: queries in latent space and their partial results, keys and values of latents."""
    into, out, wide = shapes["in"][0], shapes["out"][1], shapes["kv_up"][0]
    heads = wide // (spec.nope_dim + spec.value_dim)
    queries = heads * (2 * spec.query_dim + spec.rope.dim)
    pieces = (step.own + SHORT * step.rows) * heads * spec.latent_dim
    entry = wide + spec.latent_dim + spec.rope.dim
    keys = max(step.own * entry, min(EXPANDED // step.sketch.element, (step.own + step.earlier) * entry))
    keys *= step.sketch.element
    elements = step.own * (into + queries + 3 * out + 2 * step.hidden + heads * spec.latent_dim) + pieces
    parts = _wide(step, step.own * step.hidden, step.own * out)
    return elements * step.sketch.element + keys + parts + _narrow(step, out, step.hidden)


def _delta(step: _Step, shapes: Shapes, spec: DeltaSpec) -> int:
    """The projection, convolved; what every chunk prepares for each value head; the result, twice."""
    into, out, channels, heads = shapes["in"][0], shapes["out"][1], shapes["conv"][0], shapes["A_log"][0]
    prepared = heads * (spec.key_dim + spec.value_dim + CHUNK)
    elements = into + channels + prepared + 2 * out + 2 * step.hidden
    parts = _wide(step, step.own * step.hidden, step.own * out)
    return step.own * (elements * step.sketch.element + 3 * 4 * heads) + parts + _narrow(step, out, step.hidden)


def _dense(step: _Step, shapes: Shapes, spec: DenseSpec) -> int:
    """All tokens come together; gate and up, their product, what goes home."""
    gate_up, inner = shapes["in"][0], shapes["out"][1]
    made = step.everyone * (gate_up + inner + 3 * step.hidden) * step.sketch.element
    wide = _wide(step, step.everyone * step.hidden, step.everyone * inner)
    return made + wide + _narrow(step, inner, step.hidden)


# Of a routed row, copies of H and of I elements: what was gathered, gate and up, their product, the result. And rows
# that an expert's are filled up with, at most.
ROUTED = {"triton": (1, 1, 0)}
GATHERED = (2, 3, 128)


def _experts(step: _Step, shapes: Shapes, spec: MoESpec) -> int:
    """All tokens come together; scores of the experts; the routed rows; the shared expert; what goes home."""
    element, mesh, router = step.sketch.element, step.sketch.mesh, spec.router
    held, _, inner = shapes["experts_out"]
    of_hidden, of_inner, aligned = ROUTED.get(step.sketch.kernels.moe, GATHERED)
    routed = step.everyone * router.top_k + held * aligned
    kept = routed * of_hidden if step.sketch.kernels.wide.rows else 0
    shared = shapes["shared.in"][0] + shapes["shared.out"][1] if spec.shared else 0
    row = step.hidden * element + router.top_k * 12  # that travels, with what it chose and how much of each
    travel = (step.everyone + step.own * min(mesh.size, router.top_k)) * 2 * row if step.sketch.ranks.all_to_all else 0
    return (
        routed * (of_hidden * step.hidden + of_inner * inner) * element
        + routed * 24  # numbers of experts, weights, places
        + step.everyone * (router.num_experts * 12 + (shared + 4 * step.hidden) * element)
        + travel
        + _wide(step, (kept + 3 * step.everyone) * step.hidden, step.everyone * (inner + shared))
        + _narrow(step, step.hidden, router.top_k * inner)
    )


_PARTS: dict[type, Callable[..., int]] = {
    AttentionSpec: _attention,
    MLASpec: _latent,
    DeltaSpec: _delta,
    DenseSpec: _dense,
    MoESpec: _experts,
}
