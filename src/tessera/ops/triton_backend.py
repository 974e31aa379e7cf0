"""The versions of our Triton kernels. Imports triton, so it is imported where it is chosen (`ops/backend.py`)."""

from __future__ import annotations

import sys
from dataclasses import replace

from tessera.ops import (
    triton_attention,
    triton_cache,
    triton_combine,
    triton_delta,
    triton_expand,
    triton_fp8,
    triton_fp8_experts,
    triton_fused,
    triton_greedy,
    triton_linear,
    triton_mla,
    triton_moe,
    triton_route,
    triton_travel,
)
from tessera.ops.backend import TORCH
from tessera.ops.triton_common import settle

TRITON = replace(
    TORCH,
    name="triton",
    pack=triton_linear.pack,
    tie=triton_linear.tie,
    gated_product=triton_linear.gated_product,
    paged_attention=triton_attention.paged_attention,
    mla_absorbed=triton_mla.mla_absorbed,
    mla_expanded=triton_mla.mla_expanded,
    write_heads=triton_cache.write_heads,
    write_latents=triton_cache.write_latents,
    delta_net=triton_delta.delta_net,
    route=triton_route.choose,
    experts=triton_moe.experts,
    mixture=triton_moe.mixture,
    combine=triton_combine.combine,
    fp8_linear=triton_fp8.linear,
    fp8_gated=triton_fp8.gated,
    fp8_after_gate=triton_fp8.after_gate,
    fp8_experts=triton_fp8_experts.experts,
    fp8_mixture=triton_fp8_experts.mixture,
    rmsnorm=triton_fused.rmsnorm,
    add_rmsnorm=triton_fused.add_rmsnorm,
    silu_mul=triton_fused.silu_mul,
    sigmoid_mul=triton_fused.sigmoid_mul,
    add_gated=triton_fused.add_gated,
    greedy=triton_greedy.greedy,
    expand=triton_expand.expand,
    travel=triton_travel.TRAVEL,
)

OURS = [module for name, module in sys.modules.items() if name.startswith("tessera.ops.triton_")]
settle(value for module in OURS for value in vars(module).values())
