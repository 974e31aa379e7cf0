"""The kernels phase: which version of each operation runs, and how quantised weights are computed with."""

from __future__ import annotations

from tessera.core.config.ask import Asked
from tessera.core.config.types import Hardware, KernelConfig, Notes
from tessera.core.spec import ModelSpec, MoESpec

NAMES = {"torch_native": "torch", "pytorch": "torch"}  # SGLang's names of the same thing
FOLLOWERS = ("linear_attn_backend", "moe_runner_backend", "sampling_backend")
ALONE = {"sampling_backend": {"triton": "torch"}}  # what is not there under the attention's name
CUDA_ONLY = ("triton",)
FP8_FROM = (8, 9)  # compute capability from which on a device knows e4m3
RECORDED = {"triton"}  # backends whose launches do not depend on a step's numbers
GRAPH_TOKENS = tuple(range(64, 1025, 64))  # steps that hold longer ranges; past that, launching is no longer what costs
GraphSizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
GRAPH_FLAGS = ("cuda_graph_max_bs", "cuda_graph_bs")


def kernels_phase(
    values: Asked, spec: ModelSpec, hardware: Hardware, dtype: str, max_running: int, notes: Notes
) -> KernelConfig:
    """The versions by name; those that nobody chose follow the attention's where they exist there."""
    device = hardware.device
    _quantization(values, spec, notes)
    attention = values.word("attention_backend")
    if attention == "auto":
        attention, why = "torch", f"the one that this build has on {device}"
        if device == "cuda":
            misfit = _misfit(dtype)
            attention = "torch" if misfit else "triton"
            why = f"triton's: {misfit}" if misfit else "our kernels, which run as CUDA graphs"
        notes.decide("attention-backend", attention, why)
    attention = NAMES.get(attention, attention)
    used = {
        "linear_attn_backend": spec.recurrent,
        "moe_runner_backend": any(isinstance(layer.mlp, MoESpec) for layer in spec.layers),
        "sampling_backend": True,
    }
    chosen = [attention]
    for name in FOLLOWERS:
        asked = values.word(name)
        follows = ALONE.get(name, {}).get(attention, attention)
        if asked == "auto" and used[name]:
            notes.decide(name.replace("_", "-"), follows, f"with --attention-backend {attention}")
        chosen.append(follows if asked == "auto" else NAMES.get(asked, asked))
    _devices(values, chosen, device, dtype, notes)
    _pages(values, chosen[0], hardware, notes)
    attention, delta, moe, sampling = chosen
    run = {attention, *([delta] if spec.recurrent else []), *([moe] if used["moe_runner_backend"] else [])}
    return KernelConfig(attention, delta, moe, sampling, _graphs(values, run, device, max_running, notes))


def _graphs(values: Asked, run: set[str], device: str, max_running: int, notes: Notes) -> GraphSizes:
    """Padded sizes of the steps that run as CUDA graphs."""
    why = _no_graphs(values, run, device)
    if why:
        for name in GRAPH_FLAGS:
            if values.gave(name):
                notes.decide(f"--{name.replace('_', '-')}", "ignored", why)
        if device == "cuda":
            notes.decide("CUDA graphs", "off", why)
        return (), (), ()
    most = values.whole("cuda_graph_max_bs") or max_running
    asked = values.wholes("cuda_graph_bs")
    rows = tuple(sorted(set(asked))) if asked else graph_rows(min(most, max_running))
    if asked and values.gave("cuda_graph_max_bs"):
        notes.refuse(("--cuda-graph-bs", "--cuda-graph-max-bs"), "both say which sizes", "Leave one of them out.")
    notes.decide(
        "CUDA graphs",
        f"decode of up to {rows[-1]} rows, other steps of up to {GRAPH_TOKENS[-1]} tokens",
        f"{len(rows)} sizes of decode; each is recorded while nothing runs, or when it was met twice",
    )
    segments = tuple(1 << n for n in range(3, max(max_running.bit_length(), 3) + 1))  # all rows, and one of padding
    return rows, segments, GRAPH_TOKENS


def _no_graphs(values: Asked, run: set[str], device: str) -> str:
    """Why no step runs as a graph; empty when steps do."""
    if device != "cuda":
        return "there is no CUDA device"
    if values.on("disable_cuda_graph"):
        return "--disable-cuda-graph is given"
    if values.word("moe_a2a_backend") != "none":
        return "with --moe-a2a-backend the host learns how many rows travel, in every layer"
    others = ", ".join(sorted(run - RECORDED))
    return f"kernels of {others} read a step's numbers on the host" if others else ""


def graph_rows(most: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8, of 16 from 256 on, up to `most`."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 16, 16)]
    return (*(size for size in sizes if size < most), most)


def _devices(values: Asked, chosen: list[str], device: str, dtype: str, notes: Notes) -> None:
    """Refuses kernels that this device, this dtype or this model cannot have."""
    misfit = _misfit(dtype)
    for name, found in zip(("attention_backend", *FOLLOWERS), chosen, strict=True):
        flag = f"--{name.replace('_', '-')} {found}"
        if not values.gave(name):
            continue
        if found in CUDA_ONLY and device != "cuda":
            notes.refuse((flag, f"--device {device}"), "these kernels need a CUDA device", "Use torch.")
        elif found in CUDA_ONLY and misfit:
            notes.refuse((flag, f"--dtype {dtype}"), misfit, "Use torch.")


def _pages(values: Asked, attention: str, hardware: Hardware, notes: Notes) -> None:
    """Refuses pages that the attention's kernels cannot read on this device."""
    kv, found = values.word("kv_cache_dtype"), hardware.capability
    if kv == "fp8_e4m3" and attention in CUDA_ONLY and found is not None and found < FP8_FROM:
        notes.refuse(
            (f"--kv-cache-dtype {kv}", f"--attention-backend {attention}"),
            f"{hardware.name or 'this device'} has compute capability {found[0]}.{found[1]}, e4m3 is known from 8.9 on",
            "Use --kv-cache-dtype fp8_e5m2 or auto, or --attention-backend torch.",
        )


def _misfit(dtype: str) -> str:
    """Why Triton's kernels do not run a model; empty when they do."""
    return "they compute in float32, the model in float64" if dtype == "float64" else ""


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
