"""The kernels phase: which version of each operation runs, and how quantised weights are computed with."""

from __future__ import annotations

from tessera.core.config.ask import Asked
from tessera.core.config.types import KernelConfig, Notes
from tessera.core.spec import ModelSpec, MoESpec

NAMES = {"torch_native": "torch", "pytorch": "torch"}  # SGLang's names of the same thing
FOLLOWERS = ("linear_attn_backend", "moe_runner_backend", "sampling_backend")


def kernels_phase(values: Asked, spec: ModelSpec, device: str, notes: Notes) -> KernelConfig:
    """The versions by name; those that nobody chose follow the attention's where they exist there."""
    _quantization(values, spec, notes)
    attention = values.word("attention_backend")
    if attention == "auto":
        attention = "torch"
        notes.decide("attention-backend", attention, f"the one that this build has on {device}")
    attention = NAMES.get(attention, attention)
    used = {
        "linear_attn_backend": spec.recurrent,
        "moe_runner_backend": any(isinstance(layer.mlp, MoESpec) for layer in spec.layers),
        "sampling_backend": True,
    }
    chosen = [attention]
    for name in FOLLOWERS:
        asked = values.word(name)
        if asked == "auto" and used[name]:
            notes.decide(name.replace("_", "-"), attention, "as --attention-backend")
        chosen.append(attention if asked == "auto" else NAMES.get(asked, asked))
    return KernelConfig(*chosen)


def _quantization(values: Asked, spec: ModelSpec, notes: Notes) -> None:
    if values.text("quantization") == "fp8" and spec.block is None:
        notes.refuse(
            ("--quantization fp8", "an unquantised checkpoint"),
            "weights are not quantised while loading in this build",
            "Leave --quantization out, or serve an fp8 checkpoint.",
        )
    if spec.block is not None:
        rows, columns = spec.block
        notes.decide(
            "quantization", "dequantised while loading", f"fp8 in blocks of {rows}x{columns}; no fp8 products yet"
        )
