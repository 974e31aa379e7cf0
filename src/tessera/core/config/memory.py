"""The memory phase: how many pages and slots fit beside the weights, and how long a sequence may be.

`--mem-fraction-static` is the share of the memory free at start that weights and pools may take: on a CPU of the RAM
that this process can still get, on CUDA of the free device memory. There what else a rank needs (`needs.py`) comes
first: a share that was asked for and leaves too little is refused, the default one shrinks. A KV pool is never larger
than all rows at full length need; on a CPU, where nobody asked for a share or a size, it stays at 2 GiB or one sequence
of full length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tessera.core.config.ask import Asked
from tessera.core.config.flags_engine import FRACTION, PAGE
from tessera.core.config.needs import Rows, total
from tessera.core.config.sizes import Sizes, sizes_of
from tessera.core.config.types import Hardware, MemoryConfig, Notes
from tessera.core.mesh import Mesh
from tessera.core.quantization import Quantization
from tessera.core.spec import ModelSpec
from tessera.core.tensors import FP8, cache_dtypes

CPU_POOL = 2 << 30
STATE_SHARE = 0.5  # of the pools, for recurrent states, when nobody said how many requests run
SET_ASIDE = {"cpu": False, "cuda": True}  # whether what a rank needs besides comes off what pools may take
GIB = 1 << 30
WEIGHED = ("model", "mesh", "memory", "scheduling", "kernels")  # groups of flags that take memory
SMALLER = "a smaller --chunked-prefill-size, --max-running-requests, --context-length, --dtype or model"
KV_DTYPES = {"auto": None, "bf16": "bfloat16", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def memory_phase(
    values: Asked,
    model: tuple[ModelSpec, Quantization | None],
    hardware: Hardware,
    mesh: Mesh | None,
    dtype: str,
    needs: Sequence[Callable[[int, int], Rows]],
    rows: int,
    notes: Notes,
) -> tuple[MemoryConfig, int, int, int]:
    """Pools for up to `rows` sequences; returns them with the context length, the rows that fit, and which of `needs`.

    `hardware.memory` is that of one rank. `mesh` None: the model cannot be cut (refused elsewhere), so weighs nothing.
    `needs`: what the rank's memory goes to besides, by context length and page size, for each choice that there is; the
    first that leaves enough for the rest counts, or the last.
    """
    spec, quantization = model
    page = values.whole("page_size") or _page(hardware, notes)
    kv = KV_DTYPES.get(values.word("kv_cache_dtype"), values.word("kv_cache_dtype"))
    if kv in FP8:
        notes.decide(
            "scales of keys and values",
            1.0,
            f"they are rounded to {kv} as they are; a checkpoint that brings other scales is refused",
        )
    caches = cache_dtypes(spec, dtype, kv, values.text("mamba_ssm_dtype"))
    sizes = sizes_of(spec, mesh, page, dtype, caches, quantization) if mesh is not None else Sizes(0, 1, 1)
    context = _context(values, spec, notes)
    nth, besides = _besides(values, hardware, sizes, (counted(context, page) for counted in needs))
    budget = _budget(values, hardware, sizes.weights, besides, notes)
    pools = budget - sizes.weights
    rows, states = _rows(values, spec, sizes, pools, rows, notes)
    slots = 1 + states if spec.recurrent else 0
    left = pools - slots * sizes.slot
    num_pages, why = _pages(values, hardware, sizes.page, page, context, rows, left)
    context = _fit(values, sizes, page, num_pages, context, budget, hardware, besides, notes)
    held = max(num_pages - 1, 0) * page
    if held < rows * context:
        why = f"{why}; {held // max(rows, 1)} for each of {rows} running requests"
    notes.decide("KV pool", f"{held} tokens, {gib(num_pages * sizes.page)}", why)
    memory = MemoryConfig(
        page_size=page,
        num_pages=num_pages,
        num_slots=slots,
        kv_dtype=caches.kv,
        conv_dtype=caches.conv,
        state_dtype=caches.state,
        weight_bytes=sizes.weights,
        page_bytes=sizes.page,
        slot_bytes=sizes.slot,
        needs=besides,
        budget=budget,
        available=hardware.memory,
    )
    return memory, context, rows, nth


def _besides(values: Asked, hardware: Hardware, sizes: Sizes, tables: Iterable[Rows]) -> tuple[int, Rows]:
    """The first table that leaves what weights and pools take at least, or the last; its number first."""
    fraction = values.real("mem_fraction_static")
    taken = sizes.least if fraction is None else int(fraction * hardware.memory)
    for nth, table in enumerate(tables):
        if not SET_ASIDE[hardware.device] or total(table) + taken <= hardware.memory:
            return nth, table
    return nth, table


def _budget(values: Asked, hardware: Hardware, weights: int, besides: Rows, notes: Notes) -> int:
    """Bytes that weights and pools may take."""
    fraction, needed = values.real("mem_fraction_static"), total(besides)
    share = FRACTION[hardware.device] if fraction is None else fraction
    if fraction is None:
        notes.decide("mem-fraction-static", share, f"default on {hardware.device}: of {gib(hardware.memory)} free")
    budget = int(share * hardware.memory)
    if not besides or not SET_ASIDE[hardware.device]:
        return budget
    notes.decide("memory besides weights and pools", gib(needed), listed(besides))
    left = hardware.memory - needed
    if budget <= left or left < weights:  # what cannot hold the weights is refused with the pools
        return min(budget, max(left, 0))
    if fraction is not None:
        notes.refuse(
            (f"--mem-fraction-static {fraction:g}",),
            f"of {gib(hardware.memory)} it leaves {gib(hardware.memory - budget)}, and {gib(needed)} are needed "
            f"besides weights and pools: {listed(besides)}",
            f"Use at most --mem-fraction-static {int(1000 * left / hardware.memory) / 1000:g}, or {SMALLER}.",
            of=WEIGHED,
        )
        return budget
    notes.decide("weights and pools", gib(left), f"what is left beside that; {share:g} would be {gib(budget)}")
    return left


def listed(rows: Rows) -> str:
    """The rows for people."""
    return ", ".join(f"{name} {gib(size)}" for name, size in rows)


def _page(hardware: Hardware, notes: Notes) -> int:
    """Tokens of a page that nobody chose."""
    page = PAGE[hardware.device]
    whys = {
        "cpu": "default on cpu: prefixes are shared in whole pages",
        "cuda": "default on cuda: attention reads longer runs; prefixes are shared in whole pages, so fewer tokens",
    }
    notes.decide("page-size", page, whys[hardware.device])
    return page


def gib(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _rows(values: Asked, spec: ModelSpec, sizes: Sizes, pools: int, rows: int, notes: Notes) -> tuple[int, int]:
    """Rows, and states for them, that the memory allows; fewer than asked conflicts, than the default is told."""
    asked, states = values.whole("max_running_requests"), values.whole("max_mamba_cache_size")
    if not spec.recurrent:
        if asked is None:
            notes.decide("max-running-requests", rows, "default for this device")
        return rows, 0
    if asked is not None and states is not None and asked > states:
        notes.refuse(
            (f"--max-running-requests {asked}", f"--max-mamba-cache-size {states}"),
            "each running request needs a recurrent state",
            f"Use --max-running-requests {states}, or --max-mamba-cache-size {asked}.",
        )
    affordable = max(int(max(pools, 0) * STATE_SHARE) // sizes.slot - 1, 1)
    wanted = max(asked or 0, states or 0) or min(rows, affordable)
    if (wanted + 1) * sizes.slot > pools > 0 and wanted > 1:  # with nothing left fewer would not do: see `_fit`
        name = "--max-running-requests" if wanted == asked else "--max-mamba-cache-size"
        notes.refuse(
            (f"{name} {wanted}",),
            f"its states need {gib((wanted + 1) * sizes.slot)} of {gib(pools)} beside the weights",
            f"Use {name} {affordable}, or raise --mem-fraction-static.",
            of=WEIGHED,
        )
        return affordable, affordable
    rows = asked or min(rows, wanted)
    if asked is None:
        short = states is None and rows == affordable
        why = f"states of {gib(sizes.slot)} each may take half of the pools" if short else "default for this device"
        notes.decide("max-running-requests", rows, f"as many as --max-mamba-cache-size {states}" if states else why)
    return rows, wanted


def _context(values: Asked, spec: ModelSpec, notes: Notes) -> int:
    asked = values.whole("context_length")
    if asked is not None and asked > spec.max_positions:
        notes.refuse(
            (f"--context-length {asked}", "the model"),
            f"it knows {spec.max_positions} positions",
            f"Use at most --context-length {spec.max_positions}.",
        )
    return min(asked or spec.max_positions, spec.max_positions)


def _pages(
    values: Asked, hardware: Hardware, page_bytes: int, page: int, context: int, rows: int, left: int
) -> tuple[int, str]:
    """Pages of the pool, the scratch page included, and why so many."""
    one = -(-context // page)
    asked = values.whole("max_total_tokens")
    limits = [(left // page_bytes, "what is left beside the weights"), (one * rows + 1, "all rows at full length")]
    if asked is not None:
        limits[1] = (-(-asked // page) + 1, "--max-total-tokens")
    elif hardware.device == "cpu" and not values.gave("mem_fraction_static"):
        limits.append((max(CPU_POOL // page_bytes, one + 1), "default on cpu: 2 GiB, or one sequence of full length"))
    pages, why = min(limits)
    return max(pages, 0), why


def _fit(
    values: Asked,
    sizes: Sizes,
    page: int,
    num_pages: int,
    context: int,
    budget: int,
    hardware: Hardware,
    besides: Rows,
    notes: Notes,
) -> int:
    """The context length that the pool holds; refuses a pool that holds none, or less than was asked for."""
    held = (num_pages - 1) * page
    wanted = values.whole("max_total_tokens")
    if wanted is not None and held < wanted:
        notes.refuse(
            (f"--max-total-tokens {wanted}",),
            f"{max(held, 0)} tokens fit into {gib(budget)} beside {gib(sizes.weights)} of weights",
            f"Use at most --max-total-tokens {max(held, 0)}, or raise --mem-fraction-static.",
            of=WEIGHED,
        )
        return context
    least = min(context, 2 * page)
    if wanted is not None and held < least:
        notes.refuse(
            (f"--max-total-tokens {wanted}", f"--page-size {page}"),
            f"a pool of {held} tokens is of no use",
            f"Use at least --max-total-tokens {least}.",
            of=WEIGHED,
        )
    elif held < least:
        need = sizes.least
        more = total(besides) if SET_ASIDE[hardware.device] else 0
        share = need / hardware.memory if need + more < hardware.memory else float("inf")
        remedy = (
            f"Raise --mem-fraction-static above {share:.3g}" if share < 1 else f"It needs {gib(need + more)} at least"
        )
        notes.refuse(
            ("--mem-fraction-static",),
            f"{gib(budget)} of {gib(hardware.memory)} hold weights of {gib(sizes.weights)} and no pool of use"
            + (f"; besides them: {listed(besides)}" if more else ""),
            f"{remedy}, or choose {SMALLER if more else 'a smaller --dtype or model'}.",
            of=WEIGHED,
        )
    elif held < context and values.gave("context_length"):
        notes.refuse(
            (f"--context-length {context}", "the KV pool"),
            f"the pool holds {held} tokens",
            f"Use at most --context-length {held}, or raise --max-total-tokens or --mem-fraction-static.",
        )
    elif held < context:
        notes.decide("context-length", held, f"the model knows {context} positions, the KV pool holds {held} tokens")
        return held
    return context
