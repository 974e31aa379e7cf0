"""Small collectives between GPUs that reach each other's memory, as two kernels: `send` and `receive`.

`send` writes a rank's elements into a slot of each peer's memory and then a number beside them; `receive` waits for the
numbers of all peers and makes the result of their slots and of its own elements: side by side, or the sum in the order
of ranks, in fp32, rounded once. Between the two nothing runs: who has something else to compute does it then.

Program b is a channel of its own: it writes and reads region b of the slots, and counts its uses in `counters`. So a
program waits for one program of each peer and never for its own grid, and a CUDA graph can be replayed, since the count
is on the device; it may wrap. SLOTS, a power of two, are used in turn (`peers.py` says how many are needed). n elements
a rank, W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer
from triton.language.target_info import cuda_capability_geq

TELLING_NS = tl.constexpr(10_000_000)  # between telling that a peer is late and failing
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def _follow():
    """Waits until what was launched before has been done, and lets what comes next start (from Hopper on)."""
    if not INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _address(table_ptr, rank, DTYPE: tl.constexpr):
    """The memory of a rank, as a pointer. It begins at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(table_ptr + rank).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def send(
    x_ptr, memory_ptr, flags_ptr, counters_ptr, num, chunk,
    RANK: tl.constexpr, WORLD: tl.constexpr, SCATTERS: tl.constexpr,
    SLOTS: tl.constexpr, REGION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [n] goes to all peers, or (SCATTERS) row p of x [W, n] to peer p. A region holds REGION elements."""
    _follow()
    channel, channels = tl.program_id(0), tl.num_programs(0)
    use = tl.load(counters_ptr + channel) + 1
    slot = (use & (SLOTS - 1)) * WORLD + RANK
    lane, first = tl.arange(0, BLOCK), channel * chunk
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            source = x_ptr + (peer * num if SCATTERS else 0)
            target = _address(memory_ptr, peer, x_ptr.dtype.element_ty)
            target += (slot * channels + channel).to(tl.int64) * REGION
            for at in range(0, chunk, BLOCK):
                inside = (at + lane < chunk) & (first + at + lane < num)
                tl.store(target + at + lane, tl.load(source + first + at + lane, mask=inside, other=0), mask=inside)
    tl.debug_barrier()  # all of the program's writes before its number
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            flag = _address(flags_ptr, peer, tl.int32) + RANK * channels + channel
            tl.atomic_xchg(flag, use, sem="release", scope="sys")
    tl.store(counters_ptr + channel, use)


@triton.jit
def _wait(flag, use, late, limit_ns):
    """Until a peer's number is no older than `use` (they wrap). After `limit_ns` the kernel fails, and so the rank.

    A device that failed can be asked for nothing, so `late`, in the host's memory, is 1 by then. Threads read the clock
    apart and one of them writes: the others fail later.
    """
    if INTERPRETED:  # ranks take turns in one thread: nobody comes while one waits
        if tl.load(flag) - use < 0:
            tl.store(late, 1)
    else:
        began = globaltimer()
        while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - use < 0:
            waited = globaltimer() - began
            if waited > limit_ns:
                tl.store(late, 1)
            if waited > limit_ns + TELLING_NS:
                tl.inline_asm_elementwise(
                    "membar.sys; trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
                )
        if globaltimer() - began > limit_ns:
            tl.store(late, 0)  # it came after all


@triton.jit(do_not_specialize=["later", "limit_ns"])
def receive(
    x_ptr, out_ptr, memory_ptr, flags_ptr, counters_ptr, late_ptr, num, chunk, later, limit_ns,
    RANK: tl.constexpr, WORLD: tl.constexpr, SCATTERS: tl.constexpr, SUMS: tl.constexpr,
    SLOTS: tl.constexpr, REGION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [W, n], or (SUMS) [n], of what was sent `later` uses before the last. x as in `send`, late [W]: see
    `_wait`."""
    _follow()
    channel, channels = tl.program_id(0), tl.num_programs(0)
    use = tl.load(counters_ptr + channel) - later
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            _wait(_address(flags_ptr, RANK, tl.int32) + peer * channels + channel, use, late_ptr + peer, limit_ns)
    tl.debug_barrier()
    lane, first = tl.arange(0, BLOCK), channel * chunk
    memory = _address(memory_ptr, RANK, x_ptr.dtype.element_ty)
    own = x_ptr + (RANK * num if SCATTERS else 0)
    for at in range(0, chunk, BLOCK):
        inside = (at + lane < chunk) & (first + at + lane < num)
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(WORLD):
            slot = (use & (SLOTS - 1)) * WORLD + rank
            if rank == RANK:
                part = tl.load(own + first + at + lane, mask=inside, other=0)
            else:
                source = memory + (slot * channels + channel).to(tl.int64) * REGION + at + lane
                part = tl.load(source, mask=inside, other=0, cache_modifier=".cg")  # not from L1: others wrote it
            if SUMS:
                total = part.to(tl.float32) if rank == 0 else total + part.to(tl.float32)
            else:
                tl.store(out_ptr + rank * num + first + at + lane, part, mask=inside)
        if SUMS:
            tl.store(out_ptr + first + at + lane, total.to(out_ptr.dtype.element_ty), mask=inside)
