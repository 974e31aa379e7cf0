"""`resolve`: what was asked, for this model on this hardware, becomes one frozen `Config`.

Pure, in phases: flags, hardware, model, quantization, mesh, memory, features. A phase that meets something it cannot
honour notes it and goes on with what it can, so that all conflicts are reported together. Choices made for the user are
`Decision`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tessera.core.config.ask import Asked, read
from tessera.core.config.deep_gemm import deep_gemm_phase
from tessera.core.config.handover import handover_phase
from tessera.core.config.kernels import kernels_phase
from tessera.core.config.memory import memory_phase
from tessera.core.config.mesh import mesh_phase
from tessera.core.config.needs import Count, Rows, Sketch, counted
from tessera.core.config.quantization import quantization_phase
from tessera.core.config.types import (
    Config,
    Hardware,
    KernelConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    Notes,
    Resolved,
    SchedulingConfig,
    ServingConfig,
)
from tessera.core.errors import ConfigError
from tessera.core.mesh import SINGLE, share
from tessera.core.spec import ModelSpec, MoESpec

SHORT = {"half": "float16", "float": "float32", "bf16": "bfloat16"}
CHUNK = {"cpu": 512, "cuda": 8192}
ALONE = 32768  # CUDA, experts, nobody decodes: 2.7 % ahead of half of it on an H100 (bench/results/gpu.md)
EXPERT_ROWS = 512  # of an expert in a step below which reading its weights takes about as long as multiplying by them
LEAST_CHUNK = 2048  # CUDA: the default is halved down to this where memory is short
MAX_RUNNING = {"cpu": 64, "cuda": 256}
QUEUE_PER_ROW = 64
START_SECONDS = 300.0  # without a word while it starts: imports, compilers and allocators say nothing


def resolve(
    asked: Mapping[str, object], spec: ModelSpec, hardware: Hardware, needs: tuple[tuple[str, Count], ...] = ()
) -> Resolved:
    """The configuration for `asked` (flags in any spelling), and the decisions taken on the way.

    `needs`: what the memory of a rank goes to besides weights and pools (`run/needs.py`).

    Raises `ConfigError` with every conflict at once. Same arguments, same result; nothing is read from outside.
    """
    notes = Notes()
    values = _meant(read(asked, notes), spec, notes)
    device = _device(values, hardware, notes)
    dtype = _dtype(values, spec, hardware, notes)
    quantization, fp8 = quantization_phase(values, spec, hardware, dtype, notes)
    mesh, fits = mesh_phase(values, spec, quantization, hardware, notes)
    choices = _limits(values, spec, mesh, device, notes)
    rows = _max_running(values, device)
    each = replace(hardware, memory=share(hardware.memory, mesh.ranks_here)) if device == "cpu" else hardware
    held = mesh.mesh if fits else None
    model = (spec, quantization)
    kernels_of = partial(kernels_phase, values, spec, held or SINGLE, hardware, dtype, fp8)

    def besides(limits: Limits, context: int, page: int) -> Rows:
        """For as many rows as were asked for: if fewer fit, less is needed."""
        tokens = max(limits.most, 0 if limits.chunk else context, rows)
        known = kernels_of(rows, Notes())
        split = _halves(values, mesh, known, Notes()).split_from
        sketch = Sketch(spec, mesh, dtype, known, tokens, rows, context, page, split)
        return counted(needs, sketch) if fits else ()

    tables = [partial(besides, limits) for limits in choices]
    memory, context, max_running, nth = memory_phase(values, model, each, held, dtype, tables, rows, notes)
    limits = _decided(choices, nth, notes)
    kernels = kernels_of(max_running, notes)
    deep_gemm_phase(spec, quantization, held, kernels, hardware, notes)
    config = Config(
        model=replace(_model(values, dtype, context, notes), quantization=quantization),
        mesh=mesh,
        memory=memory,
        scheduling=_scheduling(values, spec, mesh, limits, _halves(values, mesh, kernels, notes), max_running, notes),
        kernels=kernels,
        serving=_serving(values, mesh, notes),
        logging=LoggingConfig(
            values.word("log_level"),
            values.on("log_requests"),
            values.number("decode_log_interval"),
            values.on("debug_checks"),
            values.text("log_events"),
            values.on("enable_trace"),
            values.word("otlp_traces_endpoint"),
            values.word("torch_profiler_dir"),
        ),
        handover=handover_phase(values, device, notes),
    )
    if notes.conflicts:
        raise ConfigError(notes.conflicts)
    return Resolved(config, tuple(notes.decisions))


def _meant(values: Asked, spec: ModelSpec, notes: Notes) -> Asked:
    """What was asked, but for what the model has nothing for."""
    experts = any(isinstance(layer.mlp, MoESpec) for layer in spec.layers)
    states = ("linear_attn_backend", "mamba_ssm_dtype", "max_mamba_cache_size")
    idle = [] if spec.recurrent else [(name, "the model has no recurrent state") for name in states]
    idle += [] if experts else [("moe_runner_backend", "the model has no experts")]
    for name, why in idle:
        if values.gave(name):
            notes.decide(f"--{name.replace('_', '-')}", "ignored", why)
    return values.without(name for name, _ in idle)


def _device(values: Asked, hardware: Hardware, notes: Notes) -> str:
    asked = values.word("device")
    if asked not in ("auto", hardware.device):
        notes.refuse((f"--device {asked}",), f"found {hardware.device} only", f"Use --device {hardware.device}.")
    if asked == "auto":
        found = f"{hardware.count} device(s)" if hardware.device == "cuda" else "no usable CUDA device"
        notes.decide("device", hardware.device, f"{found} found")
    return hardware.device


def _dtype(values: Asked, spec: ModelSpec, hardware: Hardware, notes: Notes) -> str:
    asked = values.word("dtype")
    if asked != "auto":
        return SHORT.get(asked, asked)
    slow = hardware.device == "cpu" and (spec.dtype == "float16" or (spec.dtype == "bfloat16" and not hardware.bf16))
    if slow:
        why = f"the checkpoint is {spec.dtype}, which this CPU multiplies slowly; float32 holds every value of it"
        notes.decide("dtype", "float32", why)
        return "float32"
    notes.decide("dtype", spec.dtype, "that of the checkpoint")
    return spec.dtype


class Limits(NamedTuple):
    """Most tokens of a step that holds prompts (0: prompts are not cut), the same where nobody could decode instead,
    and most prompt tokens of a step."""

    chunk: int
    alone: int
    prompts: int

    @property
    def most(self) -> int:
        """Most tokens of any step."""
        return max(self.chunk, self.alone) or self.prompts


def _limits(values: Asked, spec: ModelSpec, mesh: MeshConfig, device: str, notes: Notes) -> dict[Limits, str]:
    """Those that may be chosen, and why they would be: the first that memory is left beside. One that is asked for has
    no other."""
    most, asked = values.number("max_prefill_tokens"), values.whole("chunked_prefill_size")
    if asked is None:
        chunk, why = CHUNK[device], f"default on {device}"
        rows = _expert_rows(spec, chunk * mesh.dp)
        if device == "cuda" and rows < EXPERT_ROWS:
            chunk, why = 2 * chunk, f"twice the default on cuda: {CHUNK[device]} tokens are {rows:.0f} for each expert"
        # Nobody's next token waits for such a step. A dense model gains nothing from it, and first tokens come later.
        alone = ALONE if device == "cuda" and rows < float("inf") else chunk
        if values.gave("max_prefill_tokens"):
            chunk, alone = min(chunk, most), min(alone, most)
        sizes = [(chunk, n) for n in _halves_of(alone, chunk + 1)]
        sizes += [(n, n) for n in (_halves_of(chunk, LEAST_CHUNK) if device == "cuda" else [chunk])] or [(chunk, chunk)]
        first, *others = (Limits(n, m, max(m, most)) for n, m in sizes)
        return {first: why} | dict.fromkeys(others, f"larger steps leave no memory for pools; {why}")
    if asked > most and values.gave("max_prefill_tokens"):
        notes.refuse(
            (f"--chunked-prefill-size {asked}", f"--max-prefill-tokens {most}"),
            "a chunk would exceed the prompt tokens of a step",
            f"Raise --max-prefill-tokens to {asked}, or leave it out.",
        )
    return {Limits(0, 0, most) if asked == -1 else Limits(asked, asked, max(asked, most)): ""}


def _halves_of(number: int, least: int) -> list[int]:
    """The number, half of it and so on, down to `least`."""
    return [number >> n for n in range(number.bit_length()) if number >> n >= least]


def _decided(choices: dict[Limits, str], nth: int, notes: Notes) -> Limits:
    """The choice with that number; told unless it was asked for."""
    limits, why = list(choices.items())[nth]
    if limits.alone > limits.chunk:
        why = f"{why}; {limits.alone} while nobody decodes"
    if why:
        notes.decide("chunked-prefill-size", limits.chunk, why)
    return limits


def _expert_rows(spec: ModelSpec, tokens: int) -> float:
    """How many of a step's tokens an expert computes on average, where it computes fewest."""
    routers = [layer.mlp.router for layer in spec.layers if isinstance(layer.mlp, MoESpec)]
    return min((tokens * r.top_k / r.num_experts for r in routers), default=float("inf"))


def _max_running(values: Asked, device: str) -> int:
    asked, states = values.whole("max_running_requests"), values.whole("max_mamba_cache_size")
    return asked or min(MAX_RUNNING[device], states or MAX_RUNNING[device])


def _model(values: Asked, dtype: str, context: int, notes: Notes) -> ModelConfig:
    path = values.text("model_path")
    if path is None:
        notes.refuse(("--model-path",), "no model was named", "Give --model-path, for instance abacus-hybrid.")
        path = ""
    tokenizer = None if values.on("skip_tokenizer_init") else values.text("tokenizer_path") or path
    if tokenizer is None and values.text("tokenizer_path") is not None:
        notes.refuse(
            ("--skip-tokenizer-init", "--tokenizer-path"), "one asks for no tokeniser", "Leave one of them out."
        )
    return ModelConfig(
        path=path,
        served_name=values.text("served_model_name") or path,
        tokenizer_path=tokenizer,
        revision=values.text("revision"),
        download_dir=values.text("download_dir"),
        chat_template=values.text("chat_template"),
        dtype=dtype,
        load_format=values.word("load_format"),
        context_length=context,
        seed=values.number("random_seed"),
    )


def _scheduling(
    values: Asked, spec: ModelSpec, mesh: MeshConfig, limits: Limits, halves: Halves, max_running: int, notes: Notes
) -> SchedulingConfig:
    prefix = not values.on("disable_radix_cache") and not spec.recurrent
    if spec.recurrent and not values.on("disable_radix_cache"):
        notes.decide("prefix cache", "off", "the model has recurrent state, whose snapshots do not exist yet")
    policy = values.word("schedule_policy")
    if policy == "lpm" and not prefix:
        notes.refuse(
            (
                "--schedule-policy lpm",
                "--disable-radix-cache" if not spec.recurrent else "a model with recurrent state",
            ),
            "there is no prefix cache whose longest match could go first",
            "Use --schedule-policy fcfs.",
        )
    halves = _told_halves(halves, max(limits.most, max_running) if limits.chunk else float("inf"), notes)
    queued = values.whole("max_queued_requests")
    if queued is None:
        queued = QUEUE_PER_ROW * max_running
        notes.decide("max-queued-requests", queued, f"{QUEUE_PER_ROW} times the running ones; more get status 503")
    return SchedulingConfig(
        max_running=max_running,
        max_queued=queued,
        chunk_size=limits.chunk,
        alone_size=limits.alone,
        max_prefill_tokens=limits.prompts,
        mixed=values.on("enable_mixed_chunk"),
        policy=policy,
        prefix_cache=prefix,
        max_in_flight=1 if values.on("disable_overlap_schedule") else 2,
        split_from=halves.split_from,
        split_measured=halves.measured,
        split_share=halves.share,
    )


class Halves(NamedTuple):
    """From how many tokens on steps run as two halves (0: never), or are tried as such at start (`measured`), and the
    least share of a half."""

    split_from: int
    measured: bool
    share: float


def _halves(values: Asked, mesh: MeshConfig, kernels: KernelConfig, notes: Notes) -> Halves:
    """What is tried runs as it is, whole and as halves, so graphs hold neither: nothing smaller is split unasked."""
    share, smallest = values.amount("tbo_token_distribution_threshold"), values.whole("tbo_min_tokens")
    if not values.on("enable_two_batch_overlap"):
        for name in ("tbo_token_distribution_threshold", "tbo_min_tokens"):
            if values.gave(name):
                notes.decide(f"--{name.replace('_', '-')}", "ignored", "only read with --enable-two-batch-overlap")
        return Halves(0, False, share)
    if mesh.tp == 1:
        notes.decide("two-batch overlap", "off", "one rank waits on no wire")
        return Halves(0, False, share)
    if smallest is None:
        rows, _, tokens = kernels.graphs
        return Halves(max(2, 2 * max((*rows, *tokens), default=0) + 1), True, share)
    return Halves(smallest, False, share)


def _told_halves(halves: Halves, most: float, notes: Notes) -> Halves:
    """The same, after it is told from which step on there are halves, and how they are cut. Nothing is measured where
    no step is large enough. `most`: tokens of any step."""
    smallest, measured, share = halves
    if not smallest:
        return halves
    if smallest > most:
        asked = "what graphs hold is not split unasked" if measured else "from which on it is asked for"
        remedy = "give a lower --tbo-min-tokens, or raise --chunked-prefill-size"
        notes.decide("two-batch overlap", "off", f"no step holds {smallest} tokens: {asked}; {remedy}")
        return halves._replace(measured=False)
    cut = f"a half has at least {share:.0%} of the tokens, if need be by a cut inside one sequence".replace("%", " %")
    if measured:
        why = (
            f"the largest step, then smaller ones down to {smallest} tokens while halves pay; or give --tbo-min-tokens"
        )
        notes.decide("two-batch overlap", "measured at start", f"{why}; {cut}")
    else:
        notes.decide("two-batch overlap", f"steps of {smallest} tokens or more", f"as asked; {cut}")
    return halves


def _serving(values: Asked, mesh: MeshConfig, notes: Notes) -> ServingConfig:
    watchdog = values.amount("watchdog_timeout")
    start = max(watchdog, START_SECONDS, mesh.meet_within)
    if start > watchdog:
        notes.decide("watchdog-timeout", f"{watchdog:g} s once it serves", f"a start may be silent for {start:g} s")
    return ServingConfig(
        host=values.word("host"),
        port=values.number("port"),
        api_key=values.text("api_key"),
        stream_interval=values.number("stream_interval"),
        drain_timeout=values.amount("drain_timeout"),
        max_body_size=values.number("max_body_size"),
        watchdog_timeout=watchdog,
        on_failure=_on_failure(values, mesh, notes),
        max_restarts=values.number("max_restarts"),
        restart_window=values.amount("restart_window"),
        start_timeout=start,
    )


def _on_failure(values: Asked, mesh: MeshConfig, notes: Notes) -> str:
    """What follows when an engine ends."""
    asked = values.word("on_failure")
    if asked == "continue" and mesh.replicas == 1:
        flags, remedy = ("--on-failure continue", "one replica"), "Use exit or restart, or more replicas (--dp-size)."
        of = ("--dp-size", "--enable-dp-attention")
        notes.refuse(flags, "there is no other that could go on", remedy, of)
    if asked == "restart" and mesh.num_nodes > 1:
        flags, why = ("--on-failure restart", f"--nnodes {mesh.num_nodes}"), "nobody starts ranks of other hosts anew"
        notes.refuse(flags, why, "Use exit, and let whatever starts the servers start all of them anew.")
    for name in ("max_restarts", "restart_window"):
        if values.gave(name) and asked != "restart":
            notes.decide(f"--{name.replace('_', '-')}", "ignored", "only read with --on-failure restart")
    return asked
