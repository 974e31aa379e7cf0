"""Which version of each op runs: chosen once, at start-up, by name. Layers call `backend.paged_attention(...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from tessera.core.config.types import KernelConfig
from tessera.ops import attention, cpu_fused, delta, draw, fused, linear, mla, moe, norm, sample, tied
from tessera.ops.expand import Expanded, expand_reference


@dataclass(frozen=True, slots=True)
class Backend:
    """One version of each op that has several. All versions share signature and docstring (see the reference)."""

    name: str
    pack: Callable[..., linear.PackedLinear]
    tie: Callable[[Tensor], tied.Ends]
    paged_attention: Callable[..., Tensor]
    mla_absorbed: Callable[..., Tensor]
    mla_expanded: Callable[..., Tensor]
    delta_net: fused.DeltaNet
    route: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    rmsnorm: Callable[..., Tensor]
    add_rmsnorm: Callable[..., tuple[Tensor, Tensor]]
    write_heads: Callable[..., Tensor]
    write_latents: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    sigmoid_mul: Callable[..., Tensor]
    add_gated: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    expand: Callable[..., Expanded]


REFERENCE = Backend(
    name="reference",
    pack=linear.pack_reference,
    tie=tied.tie_reference,
    paged_attention=attention.paged_attention_reference,
    mla_absorbed=mla.mla_absorbed_reference,
    mla_expanded=mla.mla_expanded_reference,
    delta_net=fused.delta_net_of(delta.causal_conv_reference, delta.gated_delta_rule_reference),
    route=moe.route,
    experts=moe.experts_reference,
    rmsnorm=norm.rmsnorm,
    add_rmsnorm=norm.add_rmsnorm,
    write_heads=fused.write_heads,
    write_latents=fused.write_latents,
    silu_mul=fused.silu_mul,
    sigmoid_mul=fused.sigmoid_mul,
    add_gated=fused.add_gated,
    draw=sample.draw_reference,
    expand=expand_reference,
)

TORCH = Backend(
    name="torch",
    pack=linear.pack,
    tie=tied.tie,
    paged_attention=attention.paged_attention,
    mla_absorbed=mla.mla_absorbed,
    mla_expanded=mla.mla_expanded,
    delta_net=fused.delta_net_of(delta.causal_conv, delta.gated_delta_rule),
    route=moe.route,
    experts=moe.experts,
    rmsnorm=cpu_fused.rmsnorm,
    add_rmsnorm=cpu_fused.add_rmsnorm,
    write_heads=cpu_fused.write_heads,
    write_latents=fused.write_latents,
    silu_mul=cpu_fused.silu_mul,
    sigmoid_mul=fused.sigmoid_mul,
    add_gated=fused.add_gated,
    draw=draw.draw,
    expand=expand_reference,
)

BACKENDS = {backend.name: backend for backend in (REFERENCE, TORCH)}


def backend(name: str) -> Backend:
    """A backend by its name. Triton is imported only where its kernels are asked for."""
    if name == "triton":
        from tessera.ops.triton_backend import TRITON

        return TRITON
    return BACKENDS[name]


def chosen(kernels: KernelConfig) -> Backend:
    """The versions that a configuration names; linear maps and what is between are those of the attention's."""
    moe_runner = backend(kernels.moe)
    return replace(
        backend(kernels.attention),
        delta_net=backend(kernels.delta).delta_net,
        route=moe_runner.route,
        experts=moe_runner.experts,
        draw=backend(kernels.sampling).draw,
    )
