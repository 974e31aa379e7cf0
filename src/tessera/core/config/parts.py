"""What is kept in fp32 until all of a sum is there: `--parts-dtype`."""

from __future__ import annotations

from tessera.core.config.ask import Asked
from tessera.core.config.types import Notes
from tessera.core.mesh import Mesh
from tessera.core.parts import PARTS, cuts_experts
from tessera.core.spec import ModelSpec

NARROW = ("bfloat16", "float16")
ROUNDS = {  # products that do not stay wide
    "grouped_mm": "torch._grouped_mm gives the dtype of what it is given",
    "deep_gemm": "its products give bfloat16",
}
CUT = "of no use here, since parts of experts are rounded: whole experts (--ep-size) or float32 would end that"


def parts_phase(
    values: Asked, spec: ModelSpec, mesh: Mesh, device: str, dtype: str, moe: str, fp8: str, notes: Notes
) -> str:
    """A name of `PARTS`, the same in every layout. By default sums on CUDA, where that costs a single rank next to
    nothing; but where products of fp8 weights round them.

    `moe`, `fp8`: the kernels of experts and of fp8 weights, empty where there are none.
    """
    asked = values.word("parts_dtype")
    if dtype not in NARROW:
        if asked != "auto":
            notes.decide("--parts-dtype", "ignored", f"{dtype} is as wide")
        return "model"
    if asked == "auto":
        return _default(spec, mesh, device, fp8, notes)
    if PARTS[asked].rows and moe in ROUNDS:
        remedy = "Leave --parts-dtype out, or choose kernels whose products stay wide (--moe-runner-backend triton)."
        flags = (f"--parts-dtype {asked}", f"--moe-runner-backend {moe}")
        notes.refuse(flags, ROUNDS[moe], remedy, ("--dtype", "--quantization", "--fp8-gemm-backend"))
        return "model"
    if asked == "sums" and cuts_experts(spec, mesh):
        notes.decide("--parts-dtype", asked, CUT)
    return asked


def _default(spec: ModelSpec, mesh: Mesh, device: str, fp8: str, notes: Notes) -> str:
    if device != "cuda" or fp8 in ROUNDS:
        found, why = "model", "products that stay wide are slow on a CPU"
        if fp8 in ROUNDS:
            why = f"with --fp8-gemm-backend {fp8} {ROUNDS[fp8]}"
        why = f"each rank rounds its part of a sum: {why}; --parts-dtype float32 ends that"
    elif cuts_experts(spec, mesh):
        found, why = "sums", CUT
    else:
        found, why = "sums", "a layout rounds nothing that one rank does not"
    if mesh.size > 1:
        notes.decide("parts-dtype", found, why)
    return found
