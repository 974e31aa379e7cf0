"""Gated delta net on a GPU: what happens between its two projections. T tokens, C channels, K kernel, Hv value heads.

Short ranges go through one kernel (`triton_delta_step`). Long ones are convolved, go through the rule chunk by chunk
(`triton_delta_chunk`), and are normed and gated; each kernel skips the ranges of the other, by lengths on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.delta_forms import Form
from tessera.ops.fused import DeltaInputs
from tessera.ops.segments import Segments
from tessera.ops.triton_delta_chunk import run_chunks
from tessera.ops.triton_delta_one import one
from tessera.ops.triton_delta_step import are_many, move_window, step
from tessera.ops.triton_tiles import result

SHORT = 8  # tokens up to which a range, of a step whose form is "chunked", takes the recurrence all the same
ROWS, COLUMNS = 16, 128  # of a program of the convolution


@triton.jit(do_not_specialize=["num_tokens", "limit"])
def _convolve(
    y_ptr, taps_ptr, conv_state_ptr, mixed_ptr, cu_ptr, rows_ptr, slots_ptr,
    num_tokens, stride_y, stride_window, limit,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mixed [T, C]: silu of the causal convolution with taps [K, C], for rows of ranges longer than `limit`."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    segment = tl.load(rows_ptr + row, mask=row < num_tokens, other=0)
    first = tl.load(cu_ptr + segment)
    end = tl.load(cu_ptr + segment + 1)
    valid = (row < end) & (end - first > limit)  # beyond the last range are tokens of none
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    channel = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    t, shown = (row - first)[:, None], valid[:, None] & (channel < CHANNELS)
    early = tl.min(tl.where(valid, row - first, KERNEL), 0) < KERNEL - 1
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for j in tl.static_range(KERNEL):
        at = t - KERNEL + 1 + j
        x_at = y_ptr + (row - KERNEL + 1 + j).to(tl.int64)[:, None] * stride_y + channel
        x = tl.load(x_at, mask=shown & (at >= 0), other=0.0).to(tl.float32)
        if early:
            slot = tl.load(slots_ptr + segment).to(tl.int64)[:, None]
            old = conv_state_ptr + slot * stride_window + channel * (KERNEL - 1) + KERNEL - 1 + at
            x += tl.load(old, mask=shown & (at < 0), other=0.0).to(tl.float32)
        # As large as x: a row of taps alone would be loaded one by one and pass through shared memory.
        tap = tl.load(taps_ptr + j * CHANNELS + tl.broadcast_to(channel, x.shape), mask=shown, other=0.0)
        total += x * tap.to(tl.float32)
    mixed = (total / (1 + tl.exp(-total))).to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + row.to(tl.int64)[:, None] * CHANNELS + channel, mixed, mask=shown)


@triton.jit(do_not_specialize=["limit"])
def _shift(
    y_ptr, conv_state_ptr, cu_ptr, slots_ptr, stride_y, stride_window, limit,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The windows of ranges longer than `limit`, after all of the convolution."""
    s = tl.program_id(1)
    first = tl.load(cu_ptr + s)
    length = tl.load(cu_ptr + s + 1) - first
    if length <= limit:
        return
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    window_ptr = conv_state_ptr + tl.load(slots_ptr + s).to(tl.int64) * stride_window
    y_ptr += first.to(tl.int64) * stride_y
    move_window(y_ptr, window_ptr, length, channel, channel < CHANNELS, stride_y, KERNEL, TAPS)


@triton.jit(do_not_specialize=["num_tokens", "limit"])
def _gate(
    o_ptr, y_ptr, norm_ptr, out_ptr, cu_ptr, rows_ptr, num_tokens, stride_y, limit, eps,
    Z: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [T, Hv, Dv] = w * rmsnorm(o) * silu(z), for rows of ranges longer than `limit`."""
    head, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    segment = tl.load(rows_ptr + row, mask=row < num_tokens, other=0)
    end = tl.load(cu_ptr + segment + 1)
    valid = (row < end) & (end - tl.load(cu_ptr + segment) > limit)
    if tl.max(valid.to(tl.int32), 0) == 0:
        return
    j = tl.arange(0, DV_PADDED)[None, :]
    shown = valid[:, None] & (j < DV)
    row = row.to(tl.int64)[:, None]
    at = (row * HEADS + head) * DV + j
    o = tl.load(o_ptr + at, mask=shown, other=0.0).to(tl.float32)
    z = tl.load(y_ptr + row * stride_y + Z + head * DV + j, mask=shown, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + j, mask=j < DV, other=0.0).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o, 1) / DV + eps)[:, None] * weight * z / (1 + tl.exp(-z))
    tl.store(out_ptr + at, o.to(out_ptr.dtype.element_ty), mask=shown)


def delta_net(
    y: Tensor, inputs: DeltaInputs, conv_state: Tensor, state: Tensor, segments: Segments, form: Form
) -> Tensor:
    """See `fused.delta_net_of`; up to float32. y [T, ...] -> [T, Hv * Dv]; both states are updated in place."""
    _, num_v, _, value_dim = state.shape
    assert y.dtype != torch.float64, "up to float32"
    assert y.stride(1) == 1, "neighbouring columns"
    assert conv_state[0].is_contiguous(), "whole windows"
    assert state[0].is_contiguous(), "whole states"
    out = result(segments, y, len(y), num_v * value_dim)
    if not segments.num_segments:
        return out
    limit = SHORT if form == "chunked" else segments.num_tokens
    if segments.max_length == 1 and are_many(segments, inputs):
        one(y, inputs, conv_state, state, segments, out)
        return out
    step(y, inputs, conv_state, state, segments, limit, out)
    if segments.max_length > limit:
        mixed = _convolved(y, inputs, conv_state, segments, limit)
        o = torch.empty_like(out)
        run_chunks(mixed, y, inputs, state, segments, limit, o)
        padded = triton.next_power_of_2(value_dim)
        _gate[num_v, triton.cdiv(len(y), ROWS)](
            o, y, inputs.norm, out, segments.cu_lengths, segments.rows, len(y), y.stride(0), limit, inputs.eps,
            Z=inputs.z.start, HEADS=num_v, DV=value_dim, DV_PADDED=padded, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out


def _convolved(y: Tensor, inputs: DeltaInputs, conv_state: Tensor, segments: Segments, limit: int) -> Tensor:
    num_channels, kernel = inputs.conv.shape
    x, cu, slots = y[:, inputs.mixed], segments.cu_lengths, segments.slots
    mixed = y.new_empty(len(y), num_channels)
    columns = triton.cdiv(num_channels, COLUMNS)
    strides = y.stride(0), conv_state.stride(0)
    taps = inputs.conv.T.contiguous()  # a program reads each tap of neighbouring channels at once
    _convolve[columns, triton.cdiv(len(y), ROWS)](
        x, taps, conv_state, mixed, cu, segments.rows, slots, len(y), *strides, limit,
        CHANNELS=num_channels, KERNEL=kernel, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    _shift[columns, segments.num_segments](
        x, conv_state, cu, slots, *strides, limit,
        CHANNELS=num_channels, KERNEL=kernel, COLUMNS=COLUMNS, TAPS=triton.next_power_of_2(kernel - 1), num_warps=4,
    )  # fmt: skip
    return mixed
