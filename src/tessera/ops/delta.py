"""Gated delta net: the causal convolution and the gated delta rule (Yang et al. 2024, arXiv 2412.06464).

T tokens, S segments, C channels, K kernel, Hk key heads, Hv value heads (a multiple), Dk and Dv their dims.
State lives in slots; each op reads and writes only the slots of its segments. A sequence starts in a zeroed slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.ops.delta_forms import Form, Inputs, chunked, plan, recurrent
from tessera.ops.precision import wide
from tessera.ops.segments import Segments


def l2norm(x: Tensor) -> Tensor:
    """`x * rsqrt(sum(x^2) + 1e-6)` over the last dim."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def causal_conv_reference(x: Tensor, weight: Tensor, state: Tensor, segments: Segments) -> Tensor:
    """Depthwise causal convolution without bias, then silu: x [T, C], weight [C, K] -> [T, C].

    `state` [slot, C, K - 1] holds the last K - 1 columns before the convolution; updated in place.
    """
    dtype = wide(x.dtype)
    out = torch.empty_like(x)
    width = state.shape[-1]
    for s in range(segments.num_segments):
        tokens = segments.tokens_of(s, s + 1)
        slot = int(segments.slots[s])
        columns = torch.cat((state[slot].to(dtype), x[tokens].T.to(dtype)), 1)  # [C, K - 1 + n]
        y = torch.nn.functional.conv1d(columns[None], weight[:, None].to(dtype), groups=len(weight))[0]
        out[tokens] = torch.nn.functional.silu(y).T.to(x.dtype)
        state[slot] = columns[:, columns.shape[1] - width :].to(state.dtype)
    return out


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    segments: Segments,
    form: Form = "recurrent",
) -> Tensor:
    """q and k [T, Hk, Dk], v [T, Hv, Dv], g (log decay) and beta [T, Hv] -> [T, Hv, Dv] in v's dtype.

    In fp32 or wider: q and k are l2-normed, q divided by sqrt(Dk); per token `S *= exp(g); S += k (x) (v - S^T k) beta;
    o = S^T q`. `state` [slot, Hv, Dk, Dv] is updated in place. `form` says how ranges longer than a token are computed;
    the plain reference has one way.
    """
    dtype = wide(torch.promote_types(v.dtype, state.dtype))
    group = v.shape[1] // k.shape[1]
    q = (l2norm(q.to(dtype)) * q.shape[-1] ** -0.5).repeat_interleave(group, 1)
    k = l2norm(k.to(dtype)).repeat_interleave(group, 1)
    out = torch.empty_like(v)
    for s in range(segments.num_segments):
        slot = int(segments.slots[s])
        memory = state[slot].to(dtype)
        for t in range(*segments.tokens_of(s, s + 1).indices(len(q))):
            memory = memory * g[t].to(dtype).exp()[:, None, None]
            delta = (v[t].to(dtype) - torch.einsum("hkv,hk->hv", memory, k[t])) * beta[t].to(dtype)[:, None]
            memory = memory + k[t, :, :, None] * delta[:, None, :]
            out[t] = torch.einsum("hkv,hk->hv", memory, q[t]).to(out.dtype)
        state[slot] = memory.to(state.dtype)
    return out


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, segments: Segments) -> Tensor:
    """See `causal_conv_reference`: each segment's window and columns side by side in one strip, K shifted products."""
    dtype, width = wide(x.dtype), state.shape[-1]
    new, before, after = segments.once(("conv", width), lambda: _strip(segments, width))
    slots = segments.once("slots", segments.slots.long)
    strip = torch.empty(len(new) + before.numel(), x.shape[1], dtype=dtype, device=x.device)
    strip[before] = state[slots].transpose(1, 2).to(dtype)
    strip[new] = x.to(dtype)
    taps = weight.to(dtype).T
    y = strip[width:] * taps[width]
    for j in range(width):
        y.addcmul_(strip[j : j - width], taps[j])
    state.index_copy_(0, slots, strip[after].transpose(1, 2).to(state.dtype))
    return torch.nn.functional.silu(y[new - width]).to(x.dtype)


def _strip(segments: Segments, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the strip: of the tokens [T], of the windows before [S, K - 1] and after the step [S, K - 1]."""
    cu, at = segments.cu_lengths.long(), torch.arange(width, device=segments.device)
    shift = torch.arange(segments.num_segments + 1, device=segments.device) * width
    new = torch.arange(segments.num_tokens, device=segments.device) + (segments.rows.long() + 1) * width
    return new, (cu + shift)[:-1, None] + at, (cu + shift)[1:, None] - width + at


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    segments: Segments,
    form: Form = "recurrent",
) -> Tensor:
    """See `gated_delta_rule_reference`. Segments run side by side, one token at a time or one chunk of 64 at a time.

    "chunked" takes ranges of one token as the recurrence does: a chunk of one is the same product.
    """
    dtype = wide(torch.promote_types(v.dtype, state.dtype))
    q = l2norm(q.to(dtype)) * q.shape[-1] ** -0.5
    inputs = Inputs(q, l2norm(k.to(dtype)), v.to(dtype), g.to(dtype), beta.to(dtype))
    out = torch.empty_like(v)
    tokenwise, chunkwise = segments.once(("delta", form), lambda: plan(segments, form))
    if tokenwise is not None:
        recurrent(inputs, state, tokenwise, out)
    if chunkwise is not None:
        chunked(inputs, state, chunkwise, out)
    return out
