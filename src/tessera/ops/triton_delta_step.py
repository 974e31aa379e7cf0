"""A gated delta net token by token: decode and short ranges, everything between the projections in one launch.

S segments, T tokens, C channels (q | k | v), Hk key heads, Hv value heads (GROUP of them a key head), DK and DV their
dims. A program takes one value head of one segment, or where there are many the TAKEN = GROUP heads of a key head: it
holds a whole state, reads it once and writes it once. A range longer than `limit` is left to `triton_delta_chunk`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fused import DeltaInputs
from tessera.ops.segments import Segments
from tessera.ops.triton_common import chained, follow, num_processors


@triton.jit
def l2norm(x):
    """x [N] over its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit
def gates(a, b, decay, dt_bias):
    """(g, beta): log decay `decay * softplus(a + dt_bias)`, and sigmoid(b)."""
    shifted = a.to(tl.float32) + dt_bias.to(tl.float32)
    g = decay.to(tl.float32) * tl.where(shifted > 20, shifted, tl.log(1 + tl.exp(tl.minimum(shifted, 20.0))))
    return g, 1 / (1 + tl.exp(-b.to(tl.float32)))


@triton.jit
def _advanced(memory, q, k, v, g, beta):
    """The state [DK, DV] after a token, and what q reads from it; one reading of the old state answers q and k."""
    memory = memory * tl.exp(g)
    seen, read = tl.sum(memory * k[:, None], 0), tl.sum(memory * q[:, None], 0)
    fresh = (v - seen) * beta
    return memory + k[:, None] * fresh[None, :], read + tl.sum(q * k, 0) * fresh


@triton.jit
def column(y_ptr, window_ptr, at, channel, valid, stride_y, KERNEL: tl.constexpr):
    """Input of the convolution at token `at` of the range; before its first, what the window kept."""
    new = tl.load(y_ptr + at * stride_y + channel, mask=valid & (at >= 0), other=0.0)
    old = tl.load(window_ptr + channel * (KERNEL - 1) + KERNEL - 1 + at, mask=valid & (at < 0), other=0.0)
    return tl.where(at < 0, old.to(tl.float32), new.to(tl.float32))


@triton.jit
def _taps(w_ptr, channel, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr, AXIS: tl.constexpr):
    """What the convolution multiplies by. AXIS: where the taps lie; see `_inputs`."""
    nth = tl.expand_dims(tl.arange(0, TAPS), 1 - AXIS)
    channel, valid = tl.expand_dims(channel, AXIS), tl.expand_dims(valid, AXIS) & (nth < KERNEL)
    return tl.load(w_ptr + channel * KERNEL + nth, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _inputs(
    y_ptr, window_ptr, t, channel, valid, stride_y, KERNEL: tl.constexpr, TAPS: tl.constexpr, AXIS: tl.constexpr
):
    """What the convolution at token t reads.

    AXIS: where the taps lie. It is the one along which the result is not spread over the state afterwards; otherwise
    the compiler would turn the whole state to these few numbers' layout instead of them to its own.
    """
    nth = tl.expand_dims(tl.arange(0, TAPS), 1 - AXIS)
    channel, valid = tl.expand_dims(channel, AXIS), tl.expand_dims(valid, AXIS) & (nth < KERNEL)
    return column(y_ptr, window_ptr, t - KERNEL + 1 + nth, channel, valid, stride_y, KERNEL)


@triton.jit
def _convolved(x, taps, AXIS: tl.constexpr):
    """silu of the convolution."""
    total = tl.sum(x * taps, AXIS)
    return total / (1 + tl.exp(-total))


@triton.jit
def conv_at(
    y_ptr, window_ptr, w_ptr, t, channel, valid, stride_y, KERNEL: tl.constexpr, TAPS: tl.constexpr, AXIS: tl.constexpr
):
    """What the convolution gives at token t."""
    x = _inputs(y_ptr, window_ptr, t, channel, valid, stride_y, KERNEL, TAPS, AXIS)
    return _convolved(x, _taps(w_ptr, channel, valid, KERNEL, TAPS, AXIS), AXIS)


@triton.jit
def _token(
    y_ptr, window_ptr, conv_ptr, row, t, head, q_at, k_at, v_at, key, shown, j, q_taps, k_taps, v_taps, stride_y,
    Z: tl.constexpr, B: tl.constexpr, A: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """(q, k, v, a, b, z) of a head and token. AT_ONCE: all, with z, is read before any sum, since a sum waits for all
    warps, and loads would wait with it; else one after the other: registers are short, other heads hide the time."""
    if AT_ONCE:
        q = _inputs(y_ptr, window_ptr, t, q_at, key, stride_y, KERNEL, TAPS, 0)
        k = _inputs(y_ptr, window_ptr, t, k_at, key, stride_y, KERNEL, TAPS, 0)
        v = _inputs(y_ptr, window_ptr, t, v_at, shown, stride_y, KERNEL, TAPS, 1)
        a, b = tl.load(row + A + head), tl.load(row + B + head)
        z = tl.load(row + Z + head * DV + j, mask=shown, other=0.0)
        q, k, v = _convolved(q, q_taps, 0), _convolved(k, k_taps, 0), _convolved(v, v_taps, 1)
    else:
        q = conv_at(y_ptr, window_ptr, conv_ptr, t, q_at, key, stride_y, KERNEL, TAPS, 0)
        k = conv_at(y_ptr, window_ptr, conv_ptr, t, k_at, key, stride_y, KERNEL, TAPS, 0)
        v = conv_at(y_ptr, window_ptr, conv_ptr, t, v_at, shown, stride_y, KERNEL, TAPS, 1)
        a, b = tl.load(row + A + head), tl.load(row + B + head)
        z = 0.0
    return l2norm(q), l2norm(k), v, a, b, z


@triton.jit
def shifted(y_ptr, window_ptr, length, channel, valid, stride_y, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """[channels, TAPS]: the window after the range."""
    nth = tl.arange(0, TAPS)[None, :]
    valid = valid[:, None] & (nth < KERNEL - 1)
    return column(y_ptr, window_ptr, length - KERNEL + 1 + nth, channel[:, None], valid, stride_y, KERNEL)


@triton.jit
def put_window(window_ptr, window, channel, valid, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Writes what `shifted` gave, once nobody reads the old window."""
    nth = tl.arange(0, TAPS)[None, :]
    at = window_ptr + channel[:, None] * (KERNEL - 1) + nth
    tl.store(at, window.to(window_ptr.dtype.element_ty), mask=valid[:, None] & (nth < KERNEL - 1))


@triton.jit
def put_last(
    reader, window_ptr, q_window, k_window, q_at, k_at, valid,
    GROUP: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Writes the windows of a key head, if all others of the GROUP that read them have."""
    if tl.atomic_add(reader, 1) == GROUP - 1:
        put_window(window_ptr, q_window, q_at, valid, KERNEL, TAPS)
        put_window(window_ptr, k_window, k_at, valid, KERNEL, TAPS)
        tl.store(reader, 0)


@triton.jit
def move_window(y_ptr, window_ptr, length, channel, valid, stride_y, KERNEL: tl.constexpr, TAPS: tl.constexpr):
    """Both; only this program reads the old window, and all of it has."""
    window = shifted(y_ptr, window_ptr, length, channel, valid, stride_y, KERNEL, TAPS)
    tl.debug_barrier()
    put_window(window_ptr, window, channel, valid, KERNEL, TAPS)


@triton.jit
def _normed(o, z, z_ptr, weight, shown, eps, DV: tl.constexpr, LOADED: tl.constexpr):
    """weight * rmsnorm(o) * silu(z)."""
    if not LOADED:
        z = tl.load(z_ptr, mask=shown, other=0.0)
    z = z.to(tl.float32)
    return o * tl.rsqrt(tl.sum(o * o, 0) / DV + eps) * weight * z / (1 + tl.exp(-z))


@triton.jit(do_not_specialize=["limit"])
def _step(
    y_ptr, conv_ptr, window_ptr, state_ptr, decay_ptr, dt_bias_ptr, norm_ptr, out_ptr, cu_ptr, slots_ptr, readers_ptr,
    stride_y, stride_window, stride_state, limit, eps, q_scale,
    MIXED: tl.constexpr, Z: tl.constexpr, B: tl.constexpr, A: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr,
    DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, TAPS: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """MIXED, Z, B, A: first columns of the sections of y; KEY, VALUE: first channels of k and v. With a program a value
    head, `readers` [S, Hk] counts those that have read their key head's windows; the last one writes them, and a 0."""
    part, s = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    key, shown = i < DK, j < DV
    key_head = part * TAKEN // GROUP
    q_at, k_at = key_head * DK + i, KEY + key_head * DK + i
    weight = tl.load(norm_ptr + j, mask=shown, other=0.0).to(tl.float32)
    q_taps, k_taps, v_taps = 0, 0, 0
    if TAKEN == 1:
        q_taps, k_taps = _taps(conv_ptr, q_at, key, KERNEL, TAPS, 0), _taps(conv_ptr, k_at, key, KERNEL, TAPS, 0)
        v_taps = _taps(conv_ptr, VALUE + part * DV + j, shown, KERNEL, TAPS, 1)
    follow()
    first, slot = tl.load(cu_ptr + s), tl.load(slots_ptr + s).to(tl.int64)
    length = tl.load(cu_ptr + s + 1) - first
    if (length > limit) | (length == 0):
        return
    y_ptr += first.to(tl.int64) * stride_y
    out_ptr += first.to(tl.int64) * (HEADS * DV)
    mixed_ptr, window_ptr = y_ptr + MIXED, window_ptr + slot * stride_window
    if TAKEN == 1:
        q_window = shifted(mixed_ptr, window_ptr, length, q_at, key, stride_y, KERNEL, TAPS)
        k_window = shifted(mixed_ptr, window_ptr, length, k_at, key, stride_y, KERNEL, TAPS)
    for n in range(TAKEN):
        head = part * TAKEN + n
        memory_at = state_ptr + slot * stride_state + head * (DK * DV) + i[:, None] * DV + j[None, :]
        memory = tl.load(memory_at, mask=key[:, None] & shown[None, :], other=0.0).to(tl.float32)
        v_at = VALUE + head * DV + j
        if TAKEN == 1:
            v_window = shifted(mixed_ptr, window_ptr, length, v_at, shown, stride_y, KERNEL, TAPS)
        decay, dt_bias = tl.load(decay_ptr + head), tl.load(dt_bias_ptr + head)
        for t in range(length):
            row = y_ptr + t * stride_y
            q, k, v, a, b, z = _token(
                mixed_ptr, window_ptr, conv_ptr, row, t, head, q_at, k_at, v_at, key, shown, j, q_taps, k_taps, v_taps,
                stride_y, Z, B, A, DV, KERNEL, TAPS, TAKEN == 1,
            )  # fmt: skip
            g, beta = gates(a, b, decay, dt_bias)
            memory, o = _advanced(memory, q * q_scale, k, v, g, beta)
            o = _normed(o, z, row + Z + head * DV + j, weight, shown, eps, DV, TAKEN == 1)
            tl.store(out_ptr + (t * HEADS + head) * DV + j, o.to(out_ptr.dtype.element_ty), mask=shown)
        tl.store(memory_at, memory.to(state_ptr.dtype.element_ty), mask=key[:, None] & shown[None, :])
        if TAKEN > 1:
            move_window(mixed_ptr, window_ptr, length, v_at, shown, stride_y, KERNEL, TAPS)
        else:
            tl.debug_barrier()  # all of this program have read the windows
            put_window(window_ptr, v_window, v_at, shown, KERNEL, TAPS)
    if TAKEN > 1:
        move_window(mixed_ptr, window_ptr, length, q_at, key, stride_y, KERNEL, TAPS)
        move_window(mixed_ptr, window_ptr, length, k_at, key, stride_y, KERNEL, TAPS)
    else:
        reader = readers_ptr + s * (HEADS // GROUP) + key_head
        put_last(reader, window_ptr, q_window, k_window, q_at, k_at, key, GROUP, KERNEL, TAPS)


def are_many(segments: Segments, inputs: DeltaInputs) -> bool:
    """Whether programs of one key head each are enough for the device."""
    return inputs.key_heads * segments.num_segments >= 2 * num_processors(segments.device)


def readers_of(segments: Segments, inputs: DeltaInputs) -> Tensor:
    """[S, Hk] int32: zeros, which every launch leaves as such."""
    counts = {"size": (segments.num_segments, inputs.key_heads), "dtype": torch.int32, "device": segments.device}
    return segments.once(("readers", inputs.key_heads), lambda: torch.zeros(**counts))


def operands(
    y: Tensor, inputs: DeltaInputs, conv_state: Tensor, state: Tensor, segments: Segments, out: Tensor
) -> tuple[tuple[object, ...], dict[str, int]]:
    """What both kernels of short ranges take: their first arguments, and sizes that they are compiled for."""
    (_, num_v, key_dim, value_dim), kernel = state.shape, inputs.conv.shape[1]
    _, keys, values = inputs.channels
    arguments = (
        y, inputs.conv, conv_state, state, inputs.decay, inputs.dt_bias, inputs.norm, out,
        segments.cu_lengths, segments.slots, readers_of(segments, inputs),
        y.stride(0), conv_state.stride(0), state.stride(0),
    )  # fmt: skip
    return arguments, {
        "MIXED": inputs.mixed.start, "Z": inputs.z.start, "B": inputs.b.start, "A": inputs.a.start,
        "KEY": keys.start, "VALUE": values.start, "HEADS": num_v, "GROUP": num_v // inputs.key_heads,
        "DK": key_dim, "DV": value_dim, "DK_PADDED": triton.next_power_of_2(key_dim),
        "KERNEL": kernel, "TAPS": triton.next_power_of_2(kernel),
    }  # fmt: skip


def step(
    y: Tensor, inputs: DeltaInputs, conv_state: Tensor, state: Tensor, segments: Segments, limit: int, out: Tensor
) -> None:
    """`fused.delta_net_of` for ranges of at most `limit` tokens: writes their rows of out [T, Hv * Dv]."""
    _, num_v, key_dim, value_dim = state.shape
    taken = num_v // inputs.key_heads if are_many(segments, inputs) else 1  # the next is read while one is written
    arguments, sizes = operands(y, inputs, conv_state, state, segments, out)
    _step[num_v // taken, segments.num_segments](
        *arguments, limit, inputs.eps, key_dim**-0.5, **sizes,
        TAKEN=taken, DV_PADDED=triton.next_power_of_2(value_dim), num_warps=4, **chained(y.device),
    )  # fmt: skip
