"""The kernels phase: which version of each operation runs, and how quantised weights are computed with."""

from __future__ import annotations

from dataclasses import dataclass

from tessera.core.config.ask import Asked
from tessera.core.config.parts import parts_phase
from tessera.core.config.quantization import FP8_FROM
from tessera.core.config.types import NO_GRAPHS, GraphSizes, Hardware, KernelConfig, Notes
from tessera.core.mesh import Mesh, share
from tessera.core.parts import wide_in
from tessera.core.spec import AttentionSpec, MLASpec, ModelSpec, MoESpec

NAMES = {"torch_native": "torch", "pytorch": "torch"}  # SGLang's names of the same thing
FOLLOWERS = ("linear_attn_backend", "moe_runner_backend", "sampling_backend")
ALONE = {  # what is not there under the attention's name
    "linear_attn_backend": {"flashinfer": "triton"},
    "moe_runner_backend": {"flashinfer": "triton"},
    "sampling_backend": {"triton": "torch", "flashinfer": "torch"},
}
LIBRARIES = {"flashinfer": "flashinfer", "deep_gemm": "deep-gemm"}  # modules, and which extra of ours installs each


@dataclass(frozen=True, slots=True)
class Needs:
    """What kernels cannot do without. `dtypes`: those of the model on CUDA, and `why`; `on_cpu`: likewise, none: they
    need CUDA. `capability`: of the device."""

    dtypes: tuple[str, ...]
    why: str
    on_cpu: tuple[str, ...] = ()
    capability: tuple[int, int] = (0, 0)
    library: str = ""


NEEDS = {
    "triton": Needs(("float32", "bfloat16", "float16"), "they compute in float32"),
    "flashinfer": Needs(("bfloat16", "float16"), "it multiplies in 16 bits", capability=(8, 0), library="flashinfer"),
    "grouped_mm": Needs(
        ("bfloat16",), "its products are in bfloat16", ("float32", "bfloat16", "float16"), capability=(9, 0)
    ),
    "deep_gemm": Needs(("bfloat16",), "its products give bfloat16", capability=(9, 0), library="deep_gemm"),
}
QUANTIZED = ("--quantization", "--fp8-gemm-backend")  # what decides about products of fp8 weights
WITH_TRITON = {"triton", "flashinfer"}  # backends whose kernels are Triton's, all or what the library has none for
RECORDED = set(NEEDS)  # kernels whose launches do not depend on a step's numbers, or that have such beside them
FP8 = ("fp8_e4m3", "fp8_e5m2")
OURS = "our kernels, which run as CUDA graphs"
SLOW_START = "; flashinfer is ahead in long prompts only, 1.3 times, and compiles for minutes at its first start"
HEAD_DIMS, LATENT = (64, 128, 256), (512, 64)  # that FlashInfer has kernels for: of heads; of latents and their rope
GRAPH_TOKENS = tuple(range(64, 1025, 64))  # steps that hold longer ranges; past that, launching is no longer what costs
GRAPH_FLAGS = ("cuda_graph_max_bs", "cuda_graph_bs")
# Bytes over NVLink in the time for which a layer waits when the host must learn how many rows travel (two waits, and
# launches that begin late): exchanges of one size may waste as many.
WASTED = 45_000_000


def kernels_phase(
    values: Asked, spec: ModelSpec, mesh: Mesh, hardware: Hardware, dtype: str, fp8: str, max_running: int, notes: Notes
) -> KernelConfig:
    """The versions by name; those that nobody chose follow the attention's where they exist there.

    `fp8`: that of the products of fp8 weights, experts' too; empty where there are none.
    """
    device, attention = hardware.device, values.word("attention_backend")
    if attention == "auto":
        attention, why = "torch", f"the one that this build has on {device}"
        if device == "cuda":
            misfit = _misfit("triton", dtype)
            attention = "torch" if misfit else "triton"
            why = f"triton's: {misfit}" if misfit else OURS + (SLOW_START if "flashinfer" in hardware.libraries else "")
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
        follows, why = ALONE.get(name, {}).get(attention, attention), f"with --attention-backend {attention}"
        if name == "moe_runner_backend" and fp8 == "deep_gemm":
            stay = values.word("parts_dtype") == "float32"
            follows = "triton" if stay else fp8
            why = "its products stay wide (--parts-dtype float32)" if stay else f"with --fp8-gemm-backend {fp8}"
        if asked == "auto" and used[name]:
            notes.decide(name.replace("_", "-"), follows, why)
        chosen.append(follows if asked == "auto" else NAMES.get(asked, asked))
    _needs(values, (*chosen, fp8), hardware, dtype, notes)
    _pages(values, chosen[0], hardware, notes)
    attention, delta, moe, sampling = chosen
    if fp8 and moe == "grouped_mm" and used["moe_runner_backend"]:
        flags, why = (f"--moe-runner-backend {moe}", "weights in fp8"), "its products here are of bfloat16 weights"
        remedy = "Use deep_gemm, leave it out, or give --fp8-gemm-backend dequantize."
        notes.refuse(flags, why, remedy, QUANTIZED)
    run = {attention, *([delta] if spec.recurrent else []), *([moe] if used["moe_runner_backend"] else [])}
    padded = _padded(values, spec, device, notes)
    graphs = _graphs(values, run | ({fp8} if fp8 else set()), device, max_running, padded, notes)
    if attention == "flashinfer":
        _flashinfer(values, spec, dtype, bool(graphs.rows), notes)
    ahead = _ahead(values, run | {fp8}, device, notes)
    parts = parts_phase(values, spec, mesh, device, dtype, moe if used["moe_runner_backend"] else "", fp8, notes)
    wide = wide_in(parts, spec, mesh)
    return KernelConfig(attention, delta, moe, sampling, graphs, padded or 0, fp8, ahead, parts, wide)


def _ahead(values: Asked, run: set[str], device: str, notes: Notes) -> float:
    """Seconds that a start waits for kernels that are compiled ahead; 0: none are."""
    asked = values.amount("compile_ahead")
    if device == "cuda" and run & WITH_TRITON:
        return asked
    if values.gave("compile_ahead"):
        why = "no kernel is Triton's" if device == "cuda" else "there is no CUDA device"
        notes.decide("--compile-ahead", "ignored", why)
    return 0.0


def _padded(values: Asked, spec: ModelSpec, device: str, notes: Notes) -> int | None:
    """Most tokens of a step, all DP ranks together, that travel in exchanges of one size; None: none travel."""
    if values.word("moe_a2a_backend") != "all_to_all":
        if values.gave("moe_a2a_padded_tokens"):
            notes.decide("--moe-a2a-padded-tokens", "ignored", "only read with --moe-a2a-backend all_to_all")
        return None
    asked = values.whole("moe_a2a_padded_tokens")
    if asked is not None:
        return asked
    if device != "cuda":
        notes.decide("moe-a2a-padded-tokens", 0, f"on {device} counting first costs less than rows that nobody needs")
        return 0
    top_k = max((layer.mlp.router.top_k for layer in spec.layers if isinstance(layer.mlp, MoESpec)), default=1)
    unwanted = (1 - 1 / values.number("ep_size")) ** top_k  # that a token needs none of a rank's experts, by chance
    found = max(int(WASTED / (unwanted * 4 * spec.hidden)), GRAPH_TOKENS[-1] * _num_dp(values)) if unwanted else 0
    why = f"{1 - unwanted:.0%} of the tokens travel to each rank: counting them first pays in larger steps only"
    notes.decide("moe-a2a-padded-tokens", found, why)
    return found


def _num_dp(values: Asked) -> int:
    """Groups of the attention."""
    return values.number("dp_size") if values.on("enable_dp_attention") else 1


def _graphs(
    values: Asked, run: set[str], device: str, max_running: int, padded: int | None, notes: Notes
) -> GraphSizes:
    """Padded sizes of the steps that run as CUDA graphs. `padded`: see `_padded`."""
    most_tokens = None if padded is None else share(padded, _num_dp(values))
    why = _no_graphs(values, run, device, most_tokens)
    if why:
        for name in GRAPH_FLAGS:
            if values.gave(name):
                notes.decide(f"--{name.replace('_', '-')}", "ignored", why)
        if device == "cuda":
            notes.decide("CUDA graphs", "off", why)
        return NO_GRAPHS
    most = values.whole("cuda_graph_max_bs") or max_running
    asked = values.wholes("cuda_graph_bs")
    rows = tuple(sorted(set(asked))) if asked else graph_rows(min(most, max_running))
    tokens = GRAPH_TOKENS
    if most_tokens is not None:
        rows, tokens = (tuple(n for n in sizes if n <= most_tokens) for sizes in (rows, tokens))
    over = f"; no step has more than {max_running}" if max(most, *asked, 0) > max_running else ""
    if asked and values.gave("cuda_graph_max_bs"):
        names, remedy = ("--cuda-graph-bs", "--cuda-graph-max-bs"), "Leave one of them out."
        notes.refuse(names, "both say which sizes", remedy, ("model", "mesh", "kernels"))
    notes.decide(
        "CUDA graphs",
        f"decode of up to {max(rows, default=0)} rows, other steps of up to {max(tokens, default=0)} tokens",
        f"{len(rows)} sizes of decode; each is recorded while nothing runs, or when it was met twice{over}",
    )
    segments = tuple(1 << n for n in range(3, max(max_running.bit_length(), 3) + 1))  # all rows, and one of padding
    return GraphSizes(rows, segments, tokens)


def _no_graphs(values: Asked, run: set[str], device: str, most_tokens: int | None) -> str:
    """Why no step runs as a graph; empty when steps do."""
    if device != "cuda":
        return "there is no CUDA device"
    if values.on("disable_cuda_graph"):
        return "--disable-cuda-graph is given"
    if most_tokens == 0:
        return "without --moe-a2a-padded-tokens the host learns how many rows travel, in every layer"
    others = ", ".join(sorted(run - RECORDED))
    return f"kernels of {others} read a step's numbers on the host" if others else ""


def graph_rows(most: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8, of 16 from 256 on, up to `most`."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 16, 16)]
    return (*(size for size in sizes if size < most), most)


def _needs(values: Asked, chosen: tuple[str, ...], hardware: Hardware, dtype: str, notes: Notes) -> None:
    """Refuses kernels that this device or this dtype cannot have, and those of a library that is not here."""
    device = hardware.device
    for name, found in zip(("attention_backend", *FOLLOWERS, "fp8_gemm_backend"), chosen, strict=True):
        flag, needs = f"--{name.replace('_', '-')} {found}", NEEDS.get(found)
        if needs is None or not values.gave(name) or (name, found) == ("fp8_gemm_backend", "triton"):
            continue  # of our own products of fp8 the quantization phase knows
        misfit, has, wants = _misfit(found, dtype, device), hardware.capability or (0, 0), needs.capability
        if device != "cuda" and not needs.on_cpu:
            notes.refuse((flag, f"--device {device}"), "these kernels need a CUDA device", "Use torch.")
        elif misfit:
            notes.refuse((flag, f"--dtype {dtype}"), misfit, "Use torch." if dtype == "float64" else "Use triton.")
        elif device == "cuda" and has < wants:
            reason = f"it needs compute capability {wants[0]}.{wants[1]}, this device has {has[0]}.{has[1]}"
            notes.refuse((flag,), reason, "Use triton.")
        elif needs.library and needs.library not in hardware.libraries:
            install = f"pip install 'tessera-llm[{LIBRARIES[needs.library]}]'"
            notes.refuse((flag,), f"the module {needs.library} is not installed", f"Use triton, or {install}.")


def _pages(values: Asked, attention: str, hardware: Hardware, notes: Notes) -> None:
    """Refuses pages that the attention's kernels cannot read on this device."""
    kv, found = values.word("kv_cache_dtype"), hardware.capability
    if kv == "fp8_e4m3" and attention in ("triton", "flashinfer") and found is not None and found < FP8_FROM:
        notes.refuse(
            (f"--kv-cache-dtype {kv}", f"--attention-backend {attention}"),
            f"{hardware.name or 'this device'} has compute capability {found[0]}.{found[1]}, e4m3 is known from 8.9 on",
            "Use --kv-cache-dtype fp8_e5m2 or auto, or --attention-backend torch.",
        )


def _misfit(kernels: str, dtype: str, device: str = "cuda") -> str:
    """Why kernels do not run a model of this dtype; empty when they do."""
    needs = NEEDS[kernels]
    allowed = needs.dtypes if device == "cuda" else needs.on_cpu
    return "" if dtype in allowed else f"{needs.why}, the model is in {dtype}"


def _flashinfer(values: Asked, spec: ModelSpec, dtype: str, graphs: bool, notes: Notes) -> None:
    """Refuses a model that FlashInfer has no kernels for; tells which of its steps it does not serve."""
    flag = "--attention-backend flashinfer"
    for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
        if isinstance(mixer, AttentionSpec) and mixer.head_dim not in HEAD_DIMS:
            has = ", ".join(map(str, HEAD_DIMS))
            notes.refuse((flag,), f"heads have {mixer.head_dim} dims, it has kernels for {has}", "Use triton.")
        if isinstance(mixer, MLASpec) and (mixer.latent_dim, mixer.rope.dim) != LATENT:
            found = f"latents have {mixer.latent_dim} + {mixer.rope.dim} dims"
            notes.refuse((flag,), f"{found}, it has kernels for {LATENT[0]} + {LATENT[1]}", "Use triton.")
    kv, same = values.word("kv_cache_dtype"), ("auto", dtype, {"bfloat16": "bf16"}.get(dtype))
    latent = any(isinstance(layer.mixer, MLASpec) for layer in spec.layers)
    if kv not in (same if latent else (*same, *FP8)):
        reason = f"it reads {'latents' if latent else 'keys'} in the dtype of queries, {dtype}"
        reason += "" if latent else ", or in fp8"
        notes.refuse((flag, f"--kv-cache-dtype {kv}"), reason, "Use auto.", ("--dtype",))
    notes.decide(
        "kernels of FlashInfer", "built before the weights are read", "minutes at the first start, then cached"
    )
    if graphs:
        what, why = "attention of steps that run as CUDA graphs", "FlashInfer plans each step on the host"
        notes.decide(what, "triton", f"{why}: it serves the larger steps, or all with --disable-cuda-graph")
