"""What stays in fp32 until all of a sum is there, in a model of bfloat16 or float16 (`--parts-dtype`)."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.mesh import Mesh
from tessera.core.spec import ModelSpec, MoESpec


@dataclass(frozen=True, slots=True)
class Wide:
    """`sums`: parts of sums across ranks, and what a shared expert makes, on one rank too. `rows`: what each routed
    expert makes of a token, on one rank too."""

    sums: bool = False
    rows: bool = False


NOTHING = Wide()
PARTS = {"model": NOTHING, "sums": Wide(sums=True), "float32": Wide(sums=True, rows=True)}


def wide_in(parts: str, spec: ModelSpec, mesh: Mesh) -> Wide:
    """What of `PARTS[parts]` a layout keeps.

    Ranks that hold parts of routed experts cannot round what these make as one rank does. Then wide sums alone would
    change nothing: one rounding that the layout adds moves logprobs as far as all of them
    (`bench/results/rounding.md`).
    """
    wide = PARTS[parts]
    return wide if wide.rows or not cuts_experts(spec, mesh) else NOTHING


def cuts_experts(spec: ModelSpec, mesh: Mesh) -> bool:
    """Whether a rank holds parts of routed experts."""
    return mesh.size_of("moe") > 1 and any(isinstance(layer.mlp, MoESpec) for layer in spec.layers)
