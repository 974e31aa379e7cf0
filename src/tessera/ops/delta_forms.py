"""The two fast forms of the gated delta rule (Yang et al. 2024, arXiv 2412.06464), over many segments at once.

M segments, longest first, so that those still running at any time are the first ones. N chunks of C = 64 tokens,
ordered by time, then segment. Hk key heads, Hv value heads, Dk and Dv their dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tessera.ops.segments import Segments
from tessera.ops.upload import upload

Form = Literal["recurrent", "chunked"]
CHUNK = 64


class Inputs(NamedTuple):
    """q, k [T, Hk, Dk] normed, q scaled; v [T, Hv, Dv]; g, beta [T, Hv]; all in the dtype of the computation."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """Segments that run side by side. `tokens` [N, C]: rows of the step, a padding place repeats its segment's last
    (C = 1: none); `valid` [N, C]; `active`: how many segments run at each time, first to last."""

    slots: Tensor  # [M]
    tokens: Tensor
    valid: Tensor
    active: list[int]
    padded: bool


def plan(segments: Segments, form: Form) -> tuple[Side | None, Side | None]:
    """Which segments run token by token and which chunk by chunk."""
    lengths = segments.host_lengths
    chunkwise = np.flatnonzero(lengths > 1) if form == "chunked" else np.zeros(0, np.int64)
    tokenwise = np.setdiff1d(np.arange(len(lengths)), chunkwise)
    return _side(segments, tokenwise, 1), _side(segments, chunkwise, CHUNK)


def _side(segments: Segments, members: np.ndarray, chunk: int) -> Side | None:
    if not len(members):
        return None
    lengths = segments.host_lengths[members]
    order = np.argsort(-lengths, kind="stable")
    members, lengths = members[order], lengths[order].astype(np.int64)
    first = (np.cumsum(segments.host_lengths, dtype=np.int64) - segments.host_lengths)[members]
    counts = -(-lengths // chunk)
    time, which = np.nonzero(np.arange(counts[0])[:, None] < counts)
    places = time[:, None] * chunk + np.arange(chunk)
    valid = places < lengths[which, None]
    tokens = first[which, None] + np.minimum(places, lengths[which, None] - 1)
    device = segments.device
    return Side(
        slots=segments.slots[upload(members, device)].long(),
        tokens=upload(tokens, device),
        valid=upload(valid, device),
        active=np.bincount(time).tolist(),
        padded=not valid.all(),
    )


def recurrent(inputs: Inputs, state: Tensor, side: Side, out: Tensor) -> None:
    """Token by token, all segments of `side` at once. Updates their slots and writes their rows of out [T, Hv, Dv]."""
    tokens = side.tokens[:, 0]
    q, k, v, g, beta = (x[tokens] for x in inputs)
    group = v.shape[1] // k.shape[1]
    kq = torch.stack((k, q), 2).repeat_interleave(group, 1)  # [N, Hv, 2, Dk]
    match = (k * q).sum(-1).repeat_interleave(group, 1)[..., None]
    decay, beta = g.exp()[..., None, None], beta[..., None]
    memory = state[side.slots].to(v.dtype)
    done, outs = 0, []
    for count in side.active:
        now, at = memory[:count], slice(done, done + count)
        now.mul_(decay[at])
        seen = kq[at] @ now  # one reading of the memory answers k and q
        delta = (v[at] - seen[:, :, 0]) * beta[at]
        outs.append(seen[:, :, 1] + match[at] * delta)
        now.flatten(0, 1).baddbmm_(kq[at, :, 0].flatten(0, 1)[..., None], delta.flatten(0, 1)[:, None])
        done += count
    out[tokens] = torch.cat(outs).to(out.dtype)
    state.index_copy_(0, side.slots, memory.to(state.dtype))


def chunked(inputs: Inputs, state: Tensor, side: Side, out: Tensor) -> None:
    """Chunk by chunk: within a chunk a unit lower triangular solve, between chunks the recurrence of the memory.

    Everything that does not need the memory is done for all chunks of all segments at once.
    """
    q, k, v, g, beta = (x[side.tokens].transpose(1, 2) for x in inputs)  # [N, H, C, ...]
    if side.padded:  # neither decays nor writes
        g = g * side.valid[:, None]
        beta = beta * side.valid[:, None]
    group = v.shape[1] // k.shape[1]
    total = g.cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    square = torch.ones(gap.shape[-2:], dtype=torch.bool, device=gap.device)
    decay = gap.masked_fill_(square.triu(1), float("-inf")).exp_().unflatten(1, (-1, group))  # j <= i
    inner = (k @ k.mT)[:, :, None] * decay
    inner = inner.flatten(1, 2).mul_(beta[..., None])  # solve_triangular reads below the diagonal only
    read = ((q @ k.mT)[:, :, None] * decay).flatten(1, 2)
    k, q = (x.repeat_interleave(group, 1) for x in (k, q))
    grown = total.exp()[..., None]
    both = torch.cat((v, k * grown), -1) * beta[..., None]
    both = torch.linalg.solve_triangular(inner, both, upper=False, unitriangular=True)
    values, keys = both.split((v.shape[-1], k.shape[-1]), -1)
    left = (total[..., -1:] - total).exp()[..., None] * k
    last, q = grown[..., -1:, :], q * grown
    memory = state[side.slots].to(v.dtype)
    done, outs = 0, []
    for count in side.active:
        now, at = memory[:count], slice(done, done + count)
        fresh = values[at] - keys[at] @ now
        outs.append(q[at] @ now + read[at] @ fresh)
        now.mul_(last[at]).add_(left[at].mT @ fresh)
        done += count
    found = torch.cat(outs).transpose(1, 2)  # [N, C, Hv, Dv]
    out[side.tokens[side.valid]] = found[side.valid].to(out.dtype)
    state.index_copy_(0, side.slots, memory.to(state.dtype))
