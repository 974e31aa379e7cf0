"""The gated delta rule chunk by chunk, for long ranges (Yang et al. 2024, arXiv 2412.06464).

S segments, T tokens, chunks of C = 64 tokens, Hk key heads, Hv value heads (GROUP of them a key head), DK and DV their
dims, V columns of a state. With L the strictly lower triangle of `beta_i k_i.k_j exp(G_i - G_j)`, G the running sum of
the log decays, a chunk writes `(I + L)^-1 (beta v - beta exp(G) k S)` into the state S that it finds. All that does not
need S is made for all chunks at once (`_prepare`); then each state goes through its chunks (`_run`).

q and k stay as the convolution gave them: their l2 norms, scale and decays are factors of rows and columns of products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fused import DeltaInputs
from tessera.ops.segments import Segments
from tessera.ops.triton_common import INTERPRETED, dot, num_processors
from tessera.ops.triton_delta_step import gates

CHUNK = 64
NARROWEST = 64  # padded heads: products of 16 columns come out wrong on Hopper (Triton 3.6; rows from 16 on, in bf16)
FACTORS = 3  # of each row: G, l2 factor of k, that of q times exp(G)


@triton.jit(do_not_specialize=["num_segments", "num_chunks", "limit"])
def _list_chunks(cu_ptr, chunks_ptr, num_segments, num_chunks, limit, S: tl.constexpr, C: tl.constexpr):
    """chunks [N, 2]: segment (-1: none) and first row of each; program s lists those of segment s."""
    s = tl.program_id(0)
    every = tl.arange(0, S)
    valid = every < num_segments
    start = tl.load(cu_ptr + every, mask=valid, other=0)
    length = tl.load(cu_ptr + every + 1, mask=valid, other=0) - start
    count = tl.where(length > limit, (length + C - 1) // C, 0)
    before, own = tl.sum(tl.where(every < s, count, 0), 0), tl.sum(tl.where(every == s, count, 0), 0)
    first = tl.sum(tl.where(every == s, start, 0), 0)
    for i in range(own):
        tl.store(chunks_ptr + (before + i) * 2, s)
        tl.store(chunks_ptr + (before + i) * 2 + 1, first + i * C)
    if s == num_segments - 1:
        for i in range(before + own, num_chunks):
            tl.store(chunks_ptr + i * 2, -1)


@triton.jit
def _multiplied(a, b, EXACT: tl.constexpr):
    """a @ b, fp32 [C, C]."""
    if EXACT or INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _inverse(lower, C: tl.constexpr, EXACT: tl.constexpr):
    """(I + lower)^-1 for a strictly lower triangle [C, C].

    Blocks of 4 on the diagonal by (I - L)(I + L^2), as L^4 = 0; then pairs of blocks, [[A, 0], [M, B]]^-1 =
    [[A', 0], [-B' M A', B']], all pairs in one product. (A longer product of powers would cancel badly.)
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    unit = (i == j).to(tl.float32)
    block = tl.where(i // 4 == j // 4, lower, 0.0)
    inverse = unit - block
    inverse += _multiplied(inverse, _multiplied(block, block, EXACT), EXACT)
    for level in tl.static_range(2, 6):
        if 1 << level < C:
            between = tl.where((i >> level != j >> level) & (i >> (level + 1) == j >> (level + 1)), lower, 0.0)
            inverse -= _multiplied(inverse, _multiplied(between, inverse, EXACT), EXACT)
    return inverse


@triton.jit(do_not_specialize=["num_tokens"])
def _prepare(
    mixed_ptr, y_ptr, decay_ptr, dt_bias_ptr, chunks_ptr, cu_ptr, factors_ptr, keys_ptr, values_ptr, read_ptr,
    stride_y, num_tokens, q_scale,
    B: tl.constexpr, A: tl.constexpr, CHANNELS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """For a chunk and a value head: keys = (I + L)^-1 beta exp(G) k, values = (I + L)^-1 beta v, read: what each row's
    q finds of the chunk's own writes, and the factors of rows."""
    head, which = tl.program_id(0), tl.program_id(1)
    segment = tl.load(chunks_ptr + which * 2)
    if segment < 0:
        return
    first = tl.load(chunks_ptr + which * 2 + 1)
    nth = tl.arange(0, C)
    held = first + nth < tl.load(cu_ptr + segment + 1)
    row = (first + nth).to(tl.int64)
    i, j = tl.arange(0, DK_PADDED)[None, :], tl.arange(0, DV_PADDED)[None, :]
    key, value = held[:, None] & (i < DK), held[:, None] & (j < DV)
    channels = mixed_ptr + row[:, None] * CHANNELS
    q = tl.load(channels + (head // GROUP) * DK + i, mask=key, other=0.0)
    k = tl.load(channels + KEY + (head // GROUP) * DK + i, mask=key, other=0.0)
    own = y_ptr + row * stride_y + head
    a, b = tl.load(own + A, mask=held, other=0.0), tl.load(own + B, mask=held, other=0.0)
    g, beta = gates(a, b, tl.load(decay_ptr + head), tl.load(dt_bias_ptr + head))
    total = tl.cumsum(tl.where(held, g, 0.0), 0)
    beta = tl.where(held, beta, 0.0)
    wide_q, wide_k = q.to(tl.float32), k.to(tl.float32)
    q_factor = tl.rsqrt(tl.sum(wide_q * wide_q, 1) + 1e-6) * q_scale
    k_factor = tl.rsqrt(tl.sum(wide_k * wide_k, 1) + 1e-6)
    gap = tl.where(nth[:, None] >= nth[None, :], total[:, None] - total[None, :], -1e30)
    decay = tl.exp(gap) * k_factor[None, :]
    at = row * HEADS + head
    read = dot(q, tl.trans(k), None) * decay * q_factor[:, None]
    tl.store(read_ptr + at[:, None] * C + nth[None, :], read.to(k.dtype), mask=held[:, None])
    lower = dot(k, tl.trans(k), None) * decay * (k_factor * beta)[:, None]
    inverse = _inverse(tl.where(nth[:, None] > nth[None, :], lower, 0.0), C, EXACT)
    grown = tl.exp(total)
    keys = dot((inverse * (beta * k_factor * grown)[None, :]).to(k.dtype), k, None)
    tl.store(keys_ptr + at[:, None] * DK + i, keys.to(k.dtype), mask=key)
    v = tl.load(channels + VALUE + head * DV + j, mask=value, other=0.0)
    values = dot((inverse * beta[None, :]).to(k.dtype), v, None)
    tl.store(values_ptr + at[:, None] * DV + j, values.to(k.dtype), mask=value)
    factors = factors_ptr + at
    tl.store(factors, total, mask=held)
    tl.store(factors + num_tokens.to(tl.int64) * HEADS, k_factor, mask=held)
    tl.store(factors + num_tokens.to(tl.int64) * (2 * HEADS), q_factor * grown, mask=held)


@triton.jit(do_not_specialize=["num_tokens", "limit"])
def _run(
    mixed_ptr, keys_ptr, values_ptr, read_ptr, factors_ptr, state_ptr, out_ptr, cu_ptr, slots_ptr,
    stride_state, num_tokens, limit,
    CHANNELS: tl.constexpr, KEY: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """V columns of a state through the chunks of its range; writes the state and the rows of out [T, Hv, DV]."""
    tile, head, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_ptr + s)
    end = tl.load(cu_ptr + s + 1)
    if end - first <= limit:
        return
    i, j, nth = tl.arange(0, DK_PADDED), tile * V + tl.arange(0, V), tl.arange(0, C)
    key, shown = i < DK, j < DV
    state_ptr += tl.load(slots_ptr + s).to(tl.int64) * stride_state + head * (DK * DV)
    memory_at = state_ptr + i[:, None] * DV + j[None, :]
    memory = tl.load(memory_at, mask=key[:, None] & shown[None, :], other=0.0).to(tl.float32)
    q_ptr = mixed_ptr + (head // GROUP) * DK
    plane = num_tokens.to(tl.int64) * HEADS
    for start in tl.range(first, end, C, num_stages=STAGES):
        held = start + nth < end
        row = (start + nth).to(tl.int64)
        at = row * HEADS + head
        q = tl.load(q_ptr + row[:, None] * CHANNELS + i[None, :], mask=held[:, None] & key[None, :], other=0.0)
        k = tl.load(q_ptr + KEY + row[:, None] * CHANNELS + i[None, :], mask=held[:, None] & key[None, :], other=0.0)
        keys = tl.load(keys_ptr + at[:, None] * DK + i[None, :], mask=held[:, None] & key[None, :], other=0.0)
        values = tl.load(values_ptr + at[:, None] * DV + j[None, :], mask=held[:, None] & shown[None, :], other=0.0)
        read = tl.load(read_ptr + at[:, None] * C + nth[None, :], mask=held[:, None], other=0.0)
        total = tl.load(factors_ptr + at, mask=held, other=0.0)
        k_factor = tl.load(factors_ptr + plane + at, mask=held, other=0.0)
        q_factor = tl.load(factors_ptr + 2 * plane + at, mask=held, other=0.0)
        last = tl.load(factors_ptr + (tl.minimum(start + C, end) - 1).to(tl.int64) * HEADS + head)
        narrow = memory.to(k.dtype)
        fresh = values.to(tl.float32) - dot(keys, narrow, None)
        o = dot(q, narrow, None) * q_factor[:, None]
        o = dot(read, fresh.to(k.dtype), o)
        left = fresh * (tl.exp(last - total) * k_factor)[:, None]  # k_factor is 0 past the end
        memory = dot(tl.trans(k), left.to(k.dtype), memory * tl.exp(last))
        o_at = out_ptr + at[:, None] * DV + j[None, :]
        tl.store(o_at, o.to(out_ptr.dtype.element_ty), mask=held[:, None] & shown[None, :])
    tl.store(memory_at, memory.to(state_ptr.dtype.element_ty), mask=key[:, None] & shown[None, :])


def _chunks(segments: Segments, limit: int) -> Tensor:
    """See `_list_chunks`: [N, 2], N the most that there can be. Once a step."""
    return segments.once(("triton chunks", limit), lambda: _listed(segments, limit))


def _listed(segments: Segments, limit: int) -> Tensor:
    num = segments.num_segments
    most = (segments.num_tokens + (CHUNK - 1) * min(num, segments.num_tokens // (limit + 1))) // CHUNK
    table = torch.empty(most, 2, dtype=torch.int32, device=segments.device)
    padded = max(triton.next_power_of_2(num), 64)
    _list_chunks[num,](segments.cu_lengths, table, num, most, limit, S=padded, C=CHUNK)
    return table


def _tile(num_states: int, value_dim: int, device: torch.device) -> tuple[int, int]:
    """(columns, stages) of `_run`: narrow tiles where their programs all fit on the device, of which each takes one.

    (One stage is for products without tensor cores: with them Triton 3.6 then reads beyond its shared memory.)
    """
    few = num_states * triton.cdiv(value_dim, 32) <= num_processors(device)
    return (min(32, value_dim), 3) if few else (min(64, value_dim), 2)


def run_chunks(
    mixed: Tensor, y: Tensor, inputs: DeltaInputs, state: Tensor, segments: Segments, limit: int, out: Tensor
) -> None:
    """The rule for ranges of more than `limit` tokens: writes their rows of out [T, Hv, Dv] and their states.

    mixed [T, channels]: the convolved q, k and v; b and a are read from y.
    """
    _, num_v, key_dim, value_dim = state.shape
    num_tokens, num_channels = mixed.shape
    table = _chunks(segments, limit)
    keys = mixed.new_empty(num_tokens, num_v, key_dim)
    values = mixed.new_empty(num_tokens, num_v, value_dim)
    read = mixed.new_empty(num_tokens, num_v, CHUNK)
    factors = torch.empty(FACTORS, num_tokens, num_v, dtype=torch.float32, device=y.device)
    exact = mixed.dtype == torch.float32
    sizes = {
        "CHANNELS": num_channels, "KEY": inputs.channels[1].start, "HEADS": num_v,
        "GROUP": num_v // inputs.key_heads, "DK": key_dim, "DV": value_dim,
        "DK_PADDED": max(triton.next_power_of_2(key_dim), NARROWEST), "C": CHUNK,
    }  # fmt: skip
    padded = max(triton.next_power_of_2(value_dim), NARROWEST)
    _prepare[num_v, len(table)](
        mixed, y, inputs.decay, inputs.dt_bias, table, segments.cu_lengths, factors, keys, values, read,
        y.stride(0), num_tokens, key_dim**-0.5,
        B=inputs.b.start, A=inputs.a.start, VALUE=inputs.channels[2].start, DV_PADDED=padded, EXACT=exact,
        num_warps=4, **sizes,
    )  # fmt: skip
    columns, stages = _tile(num_v * segments.num_segments, padded, y.device)
    _run[triton.cdiv(value_dim, columns), num_v, segments.num_segments](
        mixed, keys, values, read, factors, state, out, segments.cu_lengths, segments.slots,
        state.stride(0), num_tokens, limit, V=columns, STAGES=1 if exact else stages, num_warps=4, **sizes,
    )  # fmt: skip
