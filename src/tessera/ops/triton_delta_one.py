"""A gated delta net for many ranges of one token: decode, everything between the projections in one launch.

As `triton_delta_step.py`, whose names these are, but a program holds COLUMNS of a value head's state at a time: what an
output column reads of the state and what it adds to it are of that column alone (only the gated norm takes all), so
few registers do, and many programs a multiprocessor keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tessera.ops.fused import DeltaInputs
from tessera.ops.segments import Segments
from tessera.ops.triton_common import chained, follow
from tessera.ops.triton_delta_step import conv_at, gates, l2norm, operands, put_last, put_window, shifted


@dataclass(frozen=True, slots=True)
class Cut:
    """Columns of the state at a time, and how a program runs."""

    columns: int
    warps: int
    stages: int


# By bytes of a number of the state, from one H100; `bench/kernels.py delta --sweep` tries others.
CUTS = {2: Cut(64, 2, 1), 4: Cut(128, 4, 1)}


@triton.jit
def _one(
    y_ptr, conv_ptr, window_ptr, state_ptr, decay_ptr, dt_bias_ptr, norm_ptr, out_ptr, cu_ptr, slots_ptr, readers_ptr,
    stride_y, stride_window, stride_state, eps, q_scale,
    MIXED: tl.constexpr, Z: tl.constexpr, B: tl.constexpr, A: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, KERNEL: tl.constexpr,
    DK_PADDED: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, CUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program: a value head of a segment. CUTS: how often COLUMNS are taken. `readers` as in `_step`."""
    head, s = tl.program_id(0), tl.program_id(1)
    key_head = head // GROUP
    i, j = tl.arange(0, DK_PADDED), tl.arange(0, COLUMNS)
    key = i < DK
    q_at, k_at = key_head * DK + i, KEY + key_head * DK + i
    follow()
    first, slot = tl.load(cu_ptr + s), tl.load(slots_ptr + s).to(tl.int64)
    if tl.load(cu_ptr + s + 1) == first:
        return
    y_ptr += first.to(tl.int64) * stride_y
    out_ptr += first.to(tl.int64) * (HEADS * DV) + head * DV
    mixed_ptr, window_ptr = y_ptr + MIXED, window_ptr + slot * stride_window
    state_ptr += slot * stride_state + head * (DK * DV) + i[:, None] * DV
    q_window = shifted(mixed_ptr, window_ptr, 1, q_at, key, stride_y, KERNEL, TAPS)
    k_window = shifted(mixed_ptr, window_ptr, 1, k_at, key, stride_y, KERNEL, TAPS)
    q = l2norm(conv_at(mixed_ptr, window_ptr, conv_ptr, 0, q_at, key, stride_y, KERNEL, TAPS, 0)) * q_scale
    k = l2norm(conv_at(mixed_ptr, window_ptr, conv_ptr, 0, k_at, key, stride_y, KERNEL, TAPS, 0))
    g, beta = gates(
        tl.load(y_ptr + A + head), tl.load(y_ptr + B + head), tl.load(decay_ptr + head), tl.load(dt_bias_ptr + head)
    )
    shrink, same = tl.exp(g), tl.sum(q * k, 0)
    nth, o = tl.arange(0, CUTS)[:, None], tl.zeros([CUTS, COLUMNS], tl.float32)
    for n in tl.range(0, CUTS, num_stages=STAGES):
        column = n * COLUMNS + j
        held = key[:, None] & (column < DV)[None, :]
        memory = tl.load(state_ptr + column[None, :], mask=held, other=0.0).to(tl.float32) * shrink
        v_at = VALUE + head * DV + column
        v = conv_at(mixed_ptr, window_ptr, conv_ptr, 0, v_at, column < DV, stride_y, KERNEL, TAPS, 1)
        fresh = (v - tl.sum(memory * k[:, None], 0)) * beta
        read = tl.sum(memory * q[:, None], 0) + same * fresh
        memory += k[:, None] * fresh[None, :]
        tl.store(state_ptr + column[None, :], memory.to(state_ptr.dtype.element_ty), mask=held)
        o = tl.where(nth == n, read[None, :], o)
    column = nth * COLUMNS + j[None, :]
    z = tl.load(y_ptr + Z + head * DV + column, mask=column < DV, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + column, mask=column < DV, other=0.0).to(tl.float32)
    o *= tl.rsqrt(tl.sum(o * o) / DV + eps) * weight * z / (1 + tl.exp(-z))
    tl.store(out_ptr + column, o.to(out_ptr.dtype.element_ty), mask=column < DV)
    v_at, shown = VALUE + head * DV + tl.arange(0, CUTS * COLUMNS), tl.arange(0, CUTS * COLUMNS) < DV
    v_window = shifted(mixed_ptr, window_ptr, 1, v_at, shown, stride_y, KERNEL, TAPS)
    tl.debug_barrier()  # all of this program have read the windows
    put_window(window_ptr, v_window, v_at, shown, KERNEL, TAPS)
    reader = readers_ptr + s * (HEADS // GROUP) + key_head
    put_last(reader, window_ptr, q_window, k_window, q_at, k_at, key, GROUP, KERNEL, TAPS)


def one(
    y: Tensor, inputs: DeltaInputs, conv_state: Tensor, state: Tensor, segments: Segments, out: Tensor,
    cut: Cut | None = None,
) -> None:  # fmt: skip
    """`triton_delta_step.step` for ranges of at most one token."""
    _, num_v, key_dim, value_dim = state.shape
    cut, padded = cut or CUTS[state.element_size()], triton.next_power_of_2(value_dim)
    columns = min(cut.columns, padded)
    arguments, sizes = operands(y, inputs, conv_state, state, segments, out)
    _one[num_v, segments.num_segments](
        *arguments, inputs.eps, key_dim**-0.5, **sizes,
        COLUMNS=columns, CUTS=padded // columns, STAGES=cut.stages, num_warps=cut.warps, **chained(y.device),
    )  # fmt: skip
