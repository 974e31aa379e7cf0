"""What is compiled ahead, without a device and without Triton's interpreter: `python dry_runs.py WHAT`, as JSON.

A process of its own, because Triton decides when it is first imported whether it interprets.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import DependenciesFinder, JITFunction

import tessera
from tessera.core.config.types import Config, Hardware
from tessera.ops import triton_fused, upload
from tessera.ops.backend import chosen
from tessera.ops.compiling import Compilers, Stand, Wanted, finding
from tessera.ops.triton_backend import OURS
from tessera.ops.triton_common import CHIPS, Chip, settle
from tessera.run.foreseen import NOWHERE, Dry, Ranges, foreseen
from tessera.run.startup import prepare

H100, PROCESSORS = (9, 0), 132
SHAPES = Path(__file__).parents[2] / "bench" / "shapes"
ROWS, CHUNK = 24, 1024


def dry_of(shape: str, rank: int = 0, **flags: Any) -> tuple[Config, Dry]:
    """A configuration for H100s, and the dry model of a rank (-1: the last)."""
    asked = {"model_path": str(SHAPES / shape), "load_format": "dummy", "device": "cuda", "context_length": 4096}
    asked |= {"max_running_requests": ROWS, "chunked_prefill_size": CHUNK, "skip_tokenizer_init": True, **flags}
    found = prepare(asked, {}, Hardware("cuda", 78 << 30, count=8, name="H100", capability=H100))
    config = found.resolved.config
    return config, Dry(config, found.spec, chosen(config.kernels), range(config.mesh.mesh.size)[rank])


def launched(run: Callable[[Any], None], steps: Any) -> set[Wanted]:
    """The kernels that steps launch."""
    found: set[Wanted] = set()
    with finding(found.add):
        for step in steps:
            run(step)
    return found


def any_step(rng: random.Random, left: int) -> Ranges:
    """Decodes, a chunk of up to `left` tokens, or a mix, as a planner makes them: longer ranges first."""
    ranges = []
    for _ in range(rng.choice((1, 2, 5, ROWS))):
        length = min(rng.choice((1, 1, 1, 2, 5, 9, 40, 300, rng.randint(1, CHUNK))), left)
        ranges += [(rng.choice((0, rng.randrange(2000))) if length > 1 else rng.randrange(2000), length)] * (left > 0)
        left -= length
    return tuple(sorted(ranges, key=lambda r: -r[1]))


def any_steps(rng: random.Random, config: Config) -> list[Ranges]:
    """One of every DP rank, of which some may have nothing to do."""
    steps = [any_step(rng, config.scheduling.chunk_size) if rng.random() < 0.7 else () for _ in range(config.mesh.dp)]
    return steps if any(steps) else any_steps(rng, config)


GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MIXED = {"tp_size": 2, "enable_mixed_chunk": True, "chunked_prefill_size": 256, **GROUPS}
FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}
APART = {"tp_size": 4, "ep_size": 2, "moe_dense_tp_size": 1, "enable_dp_lm_head": True, **GROUPS}
TRAVEL = {"ep_size": 2, "moe_a2a_backend": "all_to_all", "moe_a2a_padded_tokens": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("qwen3next16", {}),
    "latent, fp8": ("dsv2lite", {"quantization": "fp8"}),
    "hybrid, two groups, experts apart, fp8": ("qwen3next16", {**APART, **FP8}),
    "latent, two groups, small chunks": ("dsv2lite", MIXED),
    "latent, tokens travel": ("dsv2lite", {**MIXED, **TRAVEL}),
}


def cover(name: str) -> dict[str, Any]:
    """Kernels of steps of any lengths, on the last rank, that the first one did not foresee; and how many it did."""
    shape, flags = CASES[name]
    config, first = dry_of(shape, **flags)
    expected = launched(first.run, foreseen(config))
    rng, (_, last) = random.Random(name), dry_of(shape, -1, **flags)
    met = launched(partial(any_launch, last), [any_steps(rng, config) for _ in range(60)])
    return {"foreseen": len(expected), "met": len(met), "missed": sorted(n for _, n, _ in met - expected)}


def any_launch(dry: Dry, steps: list[Ranges]) -> None:
    """One step, of which `steps[0]` is its own part."""
    dry.launch(steps[0], tuple(steps[1:]))


def columns() -> dict[str, Any]:
    """How many kernels the same steps take where packed columns begin at 16 bytes, and where they begin anywhere."""
    _, dry = dry_of("qwen3-8b")
    steps = [tuple((64 * n + i, 1) for i in range(n)) for n in range(5, 21)]
    told = {"aligned": len(launched(dry.run, steps))}
    upload.room = lambda length: length  # the known fault
    return told | {"anywhere": len(launched(dry.run, steps))}


def compiled() -> dict[str, Any]:
    """Whether a kernel that was compiled ahead is compiled again when it is launched, and another one."""
    heard: list[bool] = []

    def launch(columns: int) -> None:
        x = torch.empty(3, columns, dtype=torch.bfloat16, device=NOWHERE)
        triton_fused.rmsnorm(x, x[0], 1e-6)

    compilers = Compilers(H100, 1, nothing, launchers=False)
    with finding(compilers.add):
        launch(64)
        launch(64)
    results = [compilers.finish(100.0)._asdict()]
    again = Compilers(H100, 1, nothing, launchers=False)
    with finding(again.add):
        launch(64)
    results.append(again.finish(100.0)._asdict())
    knobs.compilation.listener = lambda *, cache_hit, **_: heard.append(cache_hit)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup, **more: run(self, *args, warmup=True, **more)
    launch(64)
    launch(1000)
    return {"results": results, "hits": heard}


def hashed() -> dict[str, Any]:
    """How often a kernel's key is made before that of something it calls: after `settle`, and without (the fault)."""
    functions = [f for module in OURS for f in vars(module).values() if isinstance(f, JITFunction)]
    early: list[str] = []
    update = DependenciesFinder._update_hash

    def watched(self: Any, called: Any) -> None:
        early.extend([called.__name__] if called.hash is None else [])
        update(self, called)

    DependenciesFinder._update_hash = watched
    told = {}
    for name, hash_all in (("settled", settle), ("as they come", lambda all_: [f.cache_key for f in all_])):
        early.clear()
        for function in functions:
            function.hash = None
        hash_all(reversed(functions))
        told[name] = len(early)
    return told


def served(folder: str) -> dict[str, Any]:
    """Which kernels an engine on the device compiles although it waited for those that were foreseen."""
    missed: list[str] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        missed.extend([] if cache_hit else [src.name])

    knobs.compilation.listener = listen
    flags = {"device": "cuda", "load_format": "dummy", "skip_tokenizer_init": True, "max_running_requests": 16}
    with tessera.Engine(folder, compile_ahead=100, **flags) as engine:
        for lengths in ((1,), (7, 60, 3), (200, 1, 9, 30, 100)):
            asked = [list(range(3, 3 + length % 90)) * (1 + length // 90) for length in lengths]
            engine.generate(input_ids=asked, sampling_params={"max_new_tokens": 6, "temperature": 0})
    return {"missed": missed, "marks": len(list(Path(knobs.cache.dir).glob("tessera-*")))}


def nothing() -> None:
    """A worker needs no beginning here."""


if __name__ == "__main__":
    what, *of = sys.argv[1:]
    if what != "served":
        driver.set_active(Stand(H100))
        CHIPS[NOWHERE] = Chip(H100, PROCESSORS)
    told = {"cover": cover, "columns": columns, "compiled": compiled, "hashed": hashed, "served": served}[what](*of)
    sys.stdout.write(json.dumps(told) + "\n")
