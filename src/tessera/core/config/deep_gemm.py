"""The last word on DeepGEMM's products: which tiles get them, once it is known how the model is cut."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

from tessera.core.config.parts import ROUNDS
from tessera.core.config.types import Hardware, KernelConfig, Notes
from tessera.core.mesh import Mesh
from tessera.core.parts import Wide
from tessera.core.quantization import Quantization, deep_gemm_misfit
from tessera.core.scales import tile_blocks
from tessera.core.spec import ModelSpec
from tessera.core.tensors import TensorSpec
from tessera.core.weights import weight_table

NEWER = (10, 0)  # compute capability from which on its scales are powers of two
COLUMNS = 64  # of a weight in bf16, of which its products take whole ones


def deep_gemm_phase(
    spec: ModelSpec, quantization: Quantization | None, mesh: Mesh | None, kernels: KernelConfig, hardware: Hardware,
    notes: Notes,
) -> None:  # fmt: skip
    """Tells which fp8 weights DeepGEMM does not multiply, and refuses it where there are no others, or for experts in
    bf16 that it does not multiply.

    `mesh`: None where the model cannot be cut so, which is refused already.
    """
    flags = {"linear": "--fp8-gemm-backend", "experts": "--moe-runner-backend"}
    asked = {role for role, name in (("linear", kernels.fp8), ("experts", kernels.moe)) if name == "deep_gemm"}
    if not asked:
        return
    if quantization is None or not kernels.fp8:
        if mesh is not None:
            _plain_experts(spec, mesh, notes)
        return
    flag = next(f"{flags[role]} deep_gemm" for role in ("linear", "experts") if role in asked)
    if hardware.capability is not None and hardware.capability >= NEWER:
        major, minor = hardware.capability
        why = f"compute capability {major}.{minor} wants scales that are powers of two, those of these weights are not"
        notes.refuse((flag, "the weights in fp8"), why, "Use triton.")
    elif mesh is not None:
        served, left = _tiles(spec, quantization, mesh, asked, kernels.wide)
        reasons = "; ".join(dict.fromkeys(left.values()))
        if left and not served:
            notes.refuse((flag, "the weights in fp8"), reasons, "Use triton.")
        elif left:
            names = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in left)
            shown = ", ".join(f"{name} ({count})" for name, count in names.items())
            notes.decide("triton's products instead of DeepGEMM's", shown, reasons)


def _plain_experts(spec: ModelSpec, mesh: Mesh, notes: Notes) -> None:
    """Experts' weights [E, N, K] in bf16: K comes in whole blocks, on every rank."""
    parts = (part for tensor in weight_table(spec, mesh) for part in tensor.parts() if part.role == "experts")
    columns = ((part.name, part.layout.local_shape(mesh, rank)[-1]) for part in parts for rank in range(mesh.size))
    odd = next(((name, count) for name, count in columns if count % COLUMNS), None)
    if odd is not None:
        why = f"its products take columns in {COLUMNS}s, {odd[0]} has {odd[1]} on a rank"
        notes.refuse(("--moe-runner-backend deep_gemm",), why, "Use triton.")


def _tiles(
    spec: ModelSpec, quantization: Quantization, mesh: Mesh, roles: set[str], wide: Wide
) -> tuple[list[str], dict[str, str]]:
    """Names of the weights of these roles that it multiplies, and of the others, with the reason. A layer's experts
    have it for both their products or for none."""
    found: dict[str, str] = {}
    for tensor in weight_table(spec, mesh, quantization=quantization):
        for part in tensor.parts():
            if part.block is not None and part.role in roles:
                name = part.name.removesuffix("_in").removesuffix("_out") if part.role == "experts" else part.name
                misfits = filter(None, map(partial(_misfit, part, mesh), range(mesh.size)))
                stays = (wide.rows if part.role == "experts" else wide.sums) and part.gives_parts(mesh)
                rounds = ROUNDS["deep_gemm"] if stays else ""
                found[name] = found.get(name) or rounds or next(misfits, "")
    return [name for name, why in found.items() if not why], {name: why for name, why in found.items() if why}


def _misfit(part: TensorSpec, mesh: Mesh, rank: int) -> str:
    """Why it does not multiply the tile of a rank."""
    return deep_gemm_misfit(tile_blocks(part, mesh, rank)[0], part.layout.local_shape(mesh, rank))
