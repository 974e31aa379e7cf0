"""Mixture of experts. T tokens, E experts, k experts a token.

Each rank computes its share of the experts it holds, for the rows that a `Dispatch` brings to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.comm.dispatch import dispatch
from tessera.comm.waits import Waits
from tessera.core.spec import MoESpec
from tessera.models.layers import GatedMLP
from tessera.models.parts import Batch, Tools, Weights
from tessera.ops.linear import linear
from tessera.ops.precision import wide


class MoE:
    """Routed experts, plus a shared one where the model has it."""

    def __init__(self, spec: MoESpec, weights: Weights, tools: Tools) -> None:
        self.spec, self.tools = spec, tools
        self.router = weights.linear("router")
        self.bias = weights.tensor("router_bias") if spec.router.bias else None
        self.w_in, self.w_out = weights.tensor("experts_in"), weights.tensor("experts_out")
        held = weights.held("experts_in")
        self.local = None if held == list(range(spec.router.num_experts)) else self._local_ids(held)
        self.shared_mlp = GatedMLP(weights.at("shared"), tools) if spec.shared else None
        self.shared_gate = weights.linear("shared.gate") if spec.shared and spec.shared.gated else None
        holders = weights.holders("experts_in")
        self.dispatch = dispatch(tools.comm, holders, spec.router.num_experts, self.w_in.device, tools.padded_up_to)

    def __call__(self, x: Tensor, batch: Batch) -> Waits[Tensor]:
        """x [T, hidden] -> [T, hidden]."""
        return (yield from self.dispatch(x, batch.counts, self))

    def part(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """See `Experts`."""
        local = ids if self.local is None else self.local[ids]
        part: Tensor = self.tools.backend.experts(x, self.w_in, self.w_out, local, scores)
        return part

    def shared(self, x: Tensor) -> Tensor | None:
        """See `Experts`."""
        return None if self.shared_mlp is None else self.shared_mlp.part(x)

    def joined(self, part: Tensor, shared: Tensor | None, x: Tensor) -> Tensor:
        """See `Experts`."""
        if shared is None:
            return part
        out: Tensor = self.tools.backend.add_gated(part, shared, x, self.shared_gate)
        return out

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Experts`."""
        r = self.spec.router
        logits = linear(x.to(wide(x.dtype)) if r.wide else x, self.router)
        ids, scores = self.tools.backend.route(
            logits,
            r.top_k,
            scoring=r.score,
            bias=self.bias,
            num_groups=r.num_groups,
            top_groups=r.top_groups,
            group_score=r.group_score,
            normalize=r.normalise,
            scale=r.scale,
        )
        return ids, scores

    def _local_ids(self, held: list[int]) -> Tensor:
        """[E]: where this rank keeps each expert, -1 for those held elsewhere."""
        local = torch.full((self.spec.router.num_experts,), -1, dtype=torch.int64)
        local[held] = torch.arange(len(held))
        return local.to(self.w_in.device)
