"""Which version of each op runs: chosen once, at start-up, by name. Layers call `backend.paged_attention(...)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.core.config.types import KernelConfig
from tessera.core.errors import ConfigError, Conflict
from tessera.core.spec import ModelSpec
from tessera.ops import attention, cpu_fused, delta, draw, fp8, fused, grouped, linear, mla, moe, norm, sample, tied
from tessera.ops.expand import Expanded, expand_reference
from tessera.ops.fp8 import Fp8Weight
from tessera.ops.greedy import greedy
from tessera.ops.travel import TRAVEL, Travel


def nothing(spec: ModelSpec, dtype: torch.dtype, kv: torch.dtype) -> None:
    """Nothing is compiled before it is launched."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One version of each op that has several. All versions share signature and docstring (see the reference).

    `compile`: builds what a model will launch, where that takes long; given the dtypes of the model and of its pages.
    """

    name: str
    pack: Callable[..., linear.PackedLinear]
    tie: Callable[[Tensor], tied.Ends]
    gated_product: Callable[[Tensor, linear.PackedLinear], Tensor]
    paged_attention: Callable[..., Tensor]
    mla_absorbed: Callable[..., Tensor]
    mla_expanded: Callable[..., Tensor]
    delta_net: fused.DeltaNet
    route: Callable[[Tensor, moe.Router], tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    mixture: moe.Mixture
    combine: Callable[..., Tensor]
    fp8_linear: fp8.Product
    fp8_experts: Callable[..., Tensor]
    rmsnorm: Callable[..., Tensor]
    add_rmsnorm: Callable[..., tuple[Tensor, Tensor]]
    write_heads: Callable[..., Tensor]
    write_latents: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]
    sigmoid_mul: Callable[..., Tensor]
    add_gated: Callable[..., Tensor]
    draw: Callable[..., Tensor]
    greedy: Callable[[Tensor, int], Tensor]
    expand: Callable[..., Expanded]
    travel: Travel
    fp8_gated: fp8.Product | None = None
    fp8_mixture: moe.Mixture | None = None
    fp8_after_gate: Callable[[Fp8Weight], linear.AfterGate] | None = None
    compile: Callable[[ModelSpec, torch.dtype, torch.dtype], None] = nothing

    def pack_fp8(self, weight: Fp8Weight) -> linear.PackedLinear:
        """Prepares an fp8 weight [out, in] for `linear`."""
        return fp8.pack(weight, self.fp8_linear, self.fp8_gated, self.fp8_after_gate)

    def experts_of(self, w13: Tensor | Fp8Weight) -> tuple[Callable[..., Tensor], moe.Mixture]:
        """`experts` and `mixture` for weights that are kept as this one is."""
        if isinstance(w13, Fp8Weight):
            apart = moe.mixture_of(self.fp8_experts, self.gated_product, self.add_gated)
            return self.fp8_experts, self.fp8_mixture or apart
        return self.experts, self.mixture


REFERENCE = Backend(
    name="reference",
    pack=linear.pack_reference,
    tie=tied.tie_reference,
    gated_product=fused.gated_product,
    paged_attention=attention.paged_attention_reference,
    mla_absorbed=mla.mla_absorbed_reference,
    mla_expanded=mla.mla_expanded_reference,
    delta_net=fused.delta_net_of(delta.causal_conv_reference, delta.gated_delta_rule_reference),
    route=moe.choose,
    experts=moe.experts_reference,
    mixture=moe.mixture_of(moe.experts_reference, fused.gated_product, fused.add_gated),
    combine=moe.combine,
    fp8_linear=fp8.linear_reference,
    fp8_experts=fp8.experts_reference,
    rmsnorm=norm.rmsnorm,
    add_rmsnorm=norm.add_rmsnorm,
    write_heads=fused.write_heads,
    write_latents=fused.write_latents,
    silu_mul=fused.silu_mul,
    sigmoid_mul=fused.sigmoid_mul,
    add_gated=fused.add_gated,
    draw=sample.draw_reference,
    greedy=greedy,
    expand=expand_reference,
    travel=TRAVEL,
)

TORCH = replace(
    REFERENCE,
    name="torch",
    pack=linear.pack,
    tie=tied.tie,
    gated_product=cpu_fused.gated_product,
    paged_attention=attention.paged_attention,
    mla_absorbed=mla.mla_absorbed,
    mla_expanded=mla.mla_expanded,
    delta_net=fused.delta_net_of(delta.causal_conv, delta.gated_delta_rule),
    experts=moe.experts,
    mixture=moe.mixture_of(moe.experts, cpu_fused.gated_product, fused.add_gated),
    rmsnorm=cpu_fused.rmsnorm,
    add_rmsnorm=cpu_fused.add_rmsnorm,
    write_heads=cpu_fused.write_heads,
    silu_mul=cpu_fused.silu_mul,
    draw=draw.draw,
)

DEEP_GEMM_BUILD = "sgl-deep-gemm 0.1.5.post1 is one for torch 2.11"
BACKENDS = {backend.name: backend for backend in (REFERENCE, TORCH)}


def backend(name: str, recorded: int = 0) -> Backend:
    """A backend by its name. Libraries that are not on every machine are imported only where they are asked for.

    `recorded`: tokens of the largest step that a graph may hold, which then runs on kernels that can be recorded, also
    before it is.
    """
    if name == "triton":
        from tessera.ops.triton_backend import TRITON

        return TRITON
    if name == "flashinfer":
        from tessera.ops.flashinfer_backend import make

        return make(recorded)
    return BACKENDS[name]


def expert_runner(name: str, base: Backend) -> Backend:
    """Routing and experts by the name of their runner; what it has no version of is that of `base`."""
    if name == "grouped_mm":
        experts = grouped.experts_of(base.silu_mul, base.combine)
        mixture = moe.mixture_of(experts, base.gated_product, base.add_gated)
        return replace(base, experts=experts, mixture=mixture)
    return deep_gemm_products(base) if name == "deep_gemm" else backend(name)


def deep_gemm_products(base: Backend) -> Backend:
    """`base` with the products of DeepGEMM: of experts, and of fp8 weights."""
    try:
        from tessera.ops import deep_gemm, deep_gemm_fp8
    except (ImportError, OSError, RuntimeError) as reason:
        remedy = f"Use triton, or a build for torch {torch.__version__}; {DEEP_GEMM_BUILD}."
        raise ConfigError([Conflict(("deep_gemm",), f"the module does not load: {reason}", remedy)]) from reason
    return replace(
        base,
        experts=deep_gemm.experts,
        mixture=deep_gemm.mixture,
        fp8_linear=deep_gemm_fp8.linear,
        fp8_gated=deep_gemm_fp8.gated,
        fp8_after_gate=deep_gemm_fp8.after_gate,
        fp8_experts=deep_gemm_fp8.experts,
        fp8_mixture=deep_gemm_fp8.mixture,
    )


def chosen(kernels: KernelConfig) -> Backend:
    """The versions that a configuration names; linear maps and what is between are those of the attention's."""
    base = backend(kernels.attention, max((*kernels.graphs[0], *kernels.graphs[2]), default=0))
    moe_runner, products = expert_runner(kernels.moe, base), expert_runner(kernels.fp8, base) if kernels.fp8 else base
    of_experts = products
    if "deep_gemm" in (kernels.fp8, kernels.moe):  # its experts are a runner of their own
        of_experts = moe_runner if kernels.moe == "deep_gemm" else backend("triton")
    return replace(
        base,
        fp8_linear=products.fp8_linear,
        fp8_gated=products.fp8_gated,
        fp8_after_gate=products.fp8_after_gate,
        fp8_experts=of_experts.fp8_experts,
        fp8_mixture=of_experts.fp8_mixture,
        delta_net=backend(kernels.delta).delta_net,
        route=moe_runner.route,
        experts=moe_runner.experts,
        mixture=moe_runner.mixture,
        travel=moe_runner.travel,
        draw=backend(kernels.sampling).draw,
    )
