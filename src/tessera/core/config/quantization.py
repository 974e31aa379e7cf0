"""The quantization phase: which weights are in fp8, since when, and which products they get."""

from __future__ import annotations

from dataclasses import replace

from tessera.core.config.ask import Asked
from tessera.core.config.types import Hardware, Notes
from tessera.core.quantization import Quantization
from tessera.core.spec import ModelSpec

FP8_FROM = (8, 9)  # compute capability from which on a device knows e4m3
OURS = "our kernels, which read half the bytes"
FASTER = "; deep_gemm is 1.4 times faster in prompts, and compiles for half a minute at its first start"
COLUMNS = (32, 64, 128)  # of a block, of which a product of the tensor cores is as long


def quantization_phase(
    values: Asked, spec: ModelSpec, hardware: Hardware, dtype: str, notes: Notes
) -> tuple[Quantization | None, str]:
    """What is quantised, None if nothing is; and the backend of its products, empty where there are none."""
    stored, asked = spec.quantization, values.text("quantization")
    if stored is None and asked is None:
        if values.gave("fp8_gemm_backend"):
            notes.decide("--fp8-gemm-backend", "ignored", "no weights are in fp8")
        return None, ""
    found = stored or Quantization(loading=True)
    if stored is not None and values.word("load_format") == "dummy":
        found = replace(stored, loading=True)
    products = _products(values, found, hardware, dtype, notes)
    rows, columns = found.block
    when = "while they are loaded" if found.loading else "as the checkpoint has them"
    scheme = f"projections and experts in blocks of {rows}x{columns}, {when}; embedding, head and routers are not"
    if products == "dequantize":
        notes.decide("quantization", f"fp8, then back to {dtype}", f"{scheme}; activations are not quantised")
        return replace(found, dequantized=True), ""
    latent = "; kv_b_proj is dequantised, for absorbed MLA" if spec.latent else ""
    notes.decide("quantization", "fp8", f"{scheme}; activations in groups of {columns}{latent}")
    return found, products


def _products(values: Asked, found: Quantization, hardware: Hardware, dtype: str, notes: Notes) -> str:
    """The backend by name."""
    asked, misfit = values.word("fp8_gemm_backend"), _misfit(found, hardware, dtype)
    if asked == "triton" and misfit:
        flags = (f"--fp8-gemm-backend {asked}", "the weights in fp8")
        notes.refuse(flags, misfit, "Use --fp8-gemm-backend dequantize, or torch (exact, slow).")
    if asked != "auto":
        return asked
    chosen = "dequantize" if misfit else "triton"
    why = misfit or OURS + (FASTER if "deep_gemm" in hardware.libraries else "")
    notes.decide("fp8-gemm-backend", chosen, why)
    return chosen


def _misfit(found: Quantization, hardware: Hardware, dtype: str) -> str:
    """Why Triton's products of fp8 cannot be had; empty when they can."""
    rows, columns = found.block
    if hardware.device != "cuda":
        return f"{hardware.device} has no products of fp8 that are faster than those of {dtype}"
    if hardware.capability is not None and hardware.capability < FP8_FROM:
        major, minor = hardware.capability
        return f"compute capability {major}.{minor} has no products of e4m3, they begin at 8.9"
    if dtype == "float64":
        return "they add in float32, the model computes in float64"
    if columns not in COLUMNS or rows & (rows - 1):
        return f"they take blocks of a power of two by {', '.join(map(str, COLUMNS))}, found {rows}x{columns}"
    return ""
