"""Groups of small operations between products, which a device may run as one kernel; here, the plain twins.

T tokens, H heads, D head dim, R latent rank, Dr rope dim, I intermediate. y [T, ...] is the output of a fused
projection; its sections are told by slices of its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tessera.ops.attention import write_kv
from tessera.ops.delta_forms import Form
from tessera.ops.linear import PackedLinear, linear, unrounded
from tessera.ops.mla import write_latent
from tessera.ops.norm import gated_rmsnorm, rmsnorm
from tessera.ops.precision import wide
from tessera.ops.rope import RopeTables, rotate
from tessera.ops.segments import Segments

DeltaNet = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """Queries, keys and values among the columns of y. `q_norm`, `k_norm` [D]: of each head, None where there are none;
    `eps`, `zero_centred`: of these norms."""

    q: slice
    k: slice
    v: slice
    dim: int
    tables: RopeTables
    interleaved: bool
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    zero_centred: bool

    @property
    def num_q(self) -> int:
        """Query heads."""
        return (self.q.stop - self.q.start) // self.dim

    @property
    def num_k(self) -> int:
        """Key heads."""
        return (self.k.stop - self.k.start) // self.dim

    @cached_property
    def scales(self) -> Tensor | None:
        """[Hq + Hk, D] in fp32 or wider: what the norms multiply every head by."""
        if self.q_norm is None or self.k_norm is None:
            return None
        both = torch.cat((self.q_norm.expand(self.num_q, -1), self.k_norm.expand(self.num_k, -1)))
        both = both.to(wide(both.dtype))
        return 1 + both if self.zero_centred else both


def write_heads(y: Tensor, inputs: HeadInputs, pool: Tensor, segments: Segments) -> Tensor:
    """Norms and rotates queries and keys, writes keys and values into their pages: y [T, ...] -> queries [T, H, D]."""
    cos_sin = rotation(inputs.tables, segments)
    q, k, v = (y[:, at].unflatten(1, (-1, inputs.dim)) for at in (inputs.q, inputs.k, inputs.v))
    if inputs.q_norm is not None and inputs.k_norm is not None:
        q = rmsnorm(q, inputs.q_norm, inputs.eps, inputs.zero_centred)
        k = rmsnorm(k, inputs.k_norm, inputs.eps, inputs.zero_centred)
    write_kv(pool, rotate(k, *cos_sin, inputs.interleaved), v, segments)
    return rotate(q, *cos_sin, inputs.interleaved)


@dataclass(frozen=True, slots=True, eq=False)
class LatentInputs:
    """The latent and its roped key among the columns of y: `kv` [R + Dr]; `norm` [R], `eps`: of the latent."""

    kv: slice
    tables: RopeTables
    interleaved: bool
    norm: Tensor
    eps: float


def write_latents(y: Tensor, q: Tensor, inputs: LatentInputs, pool: Tensor, segments: Segments) -> Tensor:
    """Norms the latent, rotates its key, writes both into their pages; and rotates the queries q [T, H, nope + Dr].

    Gives their rotated last Dr dims [T, H, Dr].
    """
    cos_sin, dim = rotation(inputs.tables, segments), inputs.tables.dim
    latent, key = y[:, inputs.kv].split((len(inputs.norm), dim), -1)
    key = rotate(key[:, None], *cos_sin, inputs.interleaved)[:, 0]
    write_latent(pool, rmsnorm(latent, inputs.norm, inputs.eps), key, segments)
    return rotate(q[..., q.shape[-1] - dim :], *cos_sin, inputs.interleaved)


def rotation(tables: RopeTables, segments: Segments) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, Dr / 2] of the step's tokens, looked up once for all layers."""
    at = segments.positions
    return segments.once(("rope", id(tables)), lambda: (tables.cos[at][:, None], tables.sin[at][:, None]))


@dataclass(frozen=True, slots=True, eq=False)
class DeltaInputs:
    """Sections of y: the convolution's channels (q | k | v, neighbours), z, b and a. `channels`: q, k and v among the
    convolved ones. `conv` [C, K]; `decay` [Hv], -exp(A_log), and `dt_bias` [Hv] fp32 or wider; `norm` [Dv]."""

    mixed: slice
    z: slice
    b: slice
    a: slice
    channels: tuple[slice, slice, slice]
    key_heads: int
    value_heads: int
    conv: Tensor
    decay: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


def delta_net_of(causal_conv: Callable[..., Tensor], gated_delta_rule: Callable[..., Tensor]) -> DeltaNet:
    """The part of a gated delta net between its two projections, from versions of its two ops."""

    def delta_net(
        y: Tensor, inputs: DeltaInputs, conv_state: Tensor, state: Tensor, segments: Segments, form: Form
    ) -> Tensor:
        """y [T, ...] -> [T, Hv * Dv]: convolution, gates, delta rule, gated norm. Both states are updated in place."""
        mixed = causal_conv(y[:, inputs.mixed], inputs.conv, conv_state, segments)
        q, k, v = (mixed[:, at] for at in inputs.channels)
        q, k = (x.unflatten(1, (inputs.key_heads, -1)) for x in (q, k))
        v, z = (x.unflatten(1, (inputs.value_heads, -1)) for x in (v, y[:, inputs.z]))
        a = y[:, inputs.a]
        g = inputs.decay * softplus(a.to(wide(a.dtype)) + inputs.dt_bias)
        o = gated_delta_rule(q, k, v, g, y[:, inputs.b].sigmoid(), state, segments, form)
        return gated_rmsnorm(o, z, inputs.norm, inputs.eps).flatten(1)

    return delta_net


def silu_mul(y: Tensor) -> Tensor:
    """silu(gate) * up: y [T, gate | up] -> [T, I]."""
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


def gated_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """silu(gate) * up of the product with a weight [gate | up, in]: x [T, in] -> [T, I]."""
    return silu_mul(linear(x, packed))


def gated_mlp(
    x: Tensor,
    w_in: PackedLinear,
    w_out: PackedLinear,
    gated_product: Callable[[Tensor, PackedLinear], Tensor],
    wide: bool = False,
) -> Tensor:
    """x [T, in] -> [T, out]: the product of w_out with what `gated_product` makes of x and w_in [gate | up, in].

    `wide`: not rounded, see `linear.unrounded`.
    """
    after = w_out.after_gate
    if after is None or len(x) <= after.above:
        return (unrounded if wide else linear)(gated_product(x, w_in), w_out)
    return after.product(linear(x, w_in), wide)


def sigmoid_mul(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), both of one shape."""
    return x * gate.sigmoid()


def add_gated(
    part: Tensor, shared: Tensor, x: Tensor, gate: PackedLinear | None, dtype: torch.dtype | None = None
) -> Tensor:
    """part + sigmoid(gate(x)) * shared, all [T, hidden], the gate one number a token; None: part + shared. `dtype`: of
    the result (part's)."""
    out = part + (shared if gate is None else shared * linear(x, gate).sigmoid())
    return out.to(dtype or part.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """The expert that every token visits: gate | up, down, and the `gate` that scales it (one row; None: by 1)."""

    w_in: PackedLinear
    w_out: PackedLinear
    gate: PackedLinear | None
