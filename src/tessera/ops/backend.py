"""Which version of each op runs: chosen once, at start-up, by name. Layers call `backend.paged_attention(...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from tessera.core.config.types import KernelConfig
from tessera.ops import attention, delta, draw, linear, mla, moe, sample


@dataclass(frozen=True, slots=True)
class Backend:
    """One version of each op that has several. All versions share signature and docstring (see the reference)."""

    name: str
    pack: Callable[..., linear.PackedLinear]
    paged_attention: Callable[..., Tensor]
    mla_absorbed: Callable[..., Tensor]
    mla_expanded: Callable[..., Tensor]
    causal_conv: Callable[..., Tensor]
    gated_delta_rule: Callable[..., Tensor]
    experts: Callable[..., Tensor]
    draw: Callable[..., Tensor]


REFERENCE = Backend(
    name="reference",
    pack=linear.pack_reference,
    paged_attention=attention.paged_attention_reference,
    mla_absorbed=mla.mla_absorbed_reference,
    mla_expanded=mla.mla_expanded_reference,
    causal_conv=delta.causal_conv_reference,
    gated_delta_rule=delta.gated_delta_rule_reference,
    experts=moe.experts_reference,
    draw=sample.draw_reference,
)

TORCH = Backend(
    name="torch",
    pack=linear.pack,
    paged_attention=attention.paged_attention,
    mla_absorbed=mla.mla_absorbed,
    mla_expanded=mla.mla_expanded,
    causal_conv=delta.causal_conv,
    gated_delta_rule=delta.gated_delta_rule,
    experts=moe.experts,
    draw=draw.draw,
)

BACKENDS = {backend.name: backend for backend in (REFERENCE, TORCH)}


def chosen(kernels: KernelConfig) -> Backend:
    """The versions that a configuration names; linear maps are those of the attention's."""
    delta_rule = BACKENDS[kernels.delta]
    return replace(
        BACKENDS[kernels.attention],
        causal_conv=delta_rule.causal_conv,
        gated_delta_rule=delta_rule.gated_delta_rule,
        experts=BACKENDS[kernels.moe].experts,
        draw=BACKENDS[kernels.sampling].draw,
    )
