"""Mixture of experts. T tokens, E experts, k experts a token.

Each rank computes its share of the experts it holds, for the rows that a `Dispatch` brings to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.comm.dispatch import dispatch
from tessera.comm.waits import Waits
from tessera.core.spec import MoESpec, RouterSpec, SharedSpec
from tessera.models.parts import Batch, Tools, Weights
from tessera.ops.fused import Shared, gated_mlp
from tessera.ops.moe import Kept, Router, Rules
from tessera.ops.precision import kept_in

BESIDE = (16, 2048)  # tokens between which the shared expert runs beside the choice of the routed ones
ARRIVING = 64  # tokens that a kernel may choose experts for while it counts its programs


class MoE:
    """Routed experts, plus a shared one where the model has it."""

    def __init__(self, spec: MoESpec, weights: Weights, tools: Tools) -> None:
        self.spec, self.tools = spec, tools
        self.router = _router(spec.router, weights)
        self.w_in, self.w_out = weights.experts("experts_in"), weights.experts("experts_out")
        self.experts, self.mixture = tools.backend.experts_of(self.w_in)
        self.alone = tools.comm.mesh.size_of("tp") == 1  # nobody else adds to what this rank makes
        held = weights.held("experts_in")
        self.local = None if held == list(range(spec.router.num_experts)) else self._local_ids(held)
        self.shared_mlp = _shared(spec.shared, weights.at("shared")) if spec.shared else None
        holders = weights.holders("experts_in")
        self.dispatch = dispatch(
            tools.comm, holders, spec.router.num_experts, self.w_in.device, tools.padded_up_to, tools.backend.travel
        )

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        return (yield from self.dispatch.chosen(batch.largest)(x, batch.counts, self))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Experts`."""
        return self.tools.backend.route(x, self.router)

    def part(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """See `Experts`."""
        wide = self.tools.wide
        return self.experts(x, self.w_in, self.w_out, self._held(ids), scores, wide.rows, kept_in(x.dtype, wide.sums))

    def whole(self, x: Tensor) -> Tensor:
        """See `Experts`."""
        beside = self.shared_mlp is not None and BESIDE[0] <= len(x) <= BESIDE[1]
        made = self.tools.aside.run(lambda: self.shared(x)) if beside else None
        ids, scores = self.route(x)
        total = kept_in(x.dtype, self.tools.wide.sums and not self.alone)
        kept = Kept(self.tools.wide.rows, self.tools.widens("shared"), total)
        return self.mixture(x, self.w_in, self.w_out, self._held(ids), scores, self.shared_mlp, made, kept)

    def shared(self, x: Tensor) -> Tensor | None:
        """See `Experts`."""
        mlp = self.shared_mlp
        return (
            None
            if mlp is None
            else gated_mlp(x, mlp.w_in, mlp.w_out, self.tools.backend.gated_product, self.tools.widens("shared"))
        )

    def joined(self, part: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        """See `Experts`."""
        if self.shared_mlp is None or shared is None:
            return part.to(x.dtype)
        out: Tensor = self.tools.backend.add_gated(part, shared, x, self.shared_mlp.gate, x.dtype)
        return out

    def _held(self, ids: Tensor) -> Tensor:
        return ids if self.local is None else self.local[ids]

    def _local_ids(self, held: list[int]) -> Tensor:
        """[E]: where this rank keeps each expert, -1 for those held elsewhere."""
        local = torch.full((self.spec.router.num_experts,), -1, dtype=torch.int64)
        local[held] = torch.arange(len(held))
        return local.to(self.w_in.device)


def _router(spec: RouterSpec, weights: Weights) -> Router:
    """How tokens choose experts."""
    weight = weights.linear("router")
    rules = Rules(
        spec.top_k,
        spec.score,
        weights.tensor("router_bias") if spec.bias else None,
        spec.num_groups,
        spec.top_groups,
        spec.group_score,
        spec.normalise,
        spec.scale,
    )
    return Router(weight, spec.wide, rules, torch.zeros(ARRIVING, dtype=torch.int32, device=weight.weight.device))


def _shared(spec: SharedSpec, weights: Weights) -> Shared:
    """What every token visits."""
    return Shared(weights.linear("in"), weights.linear("out"), weights.linear("gate") if spec.gated else None)
