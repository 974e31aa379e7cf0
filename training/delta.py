"""The gated delta rule over whole sequences, in chunks, differentiable (Yang et al. 2024, arXiv:2412.06464).

Legend: B sequences, T tokens, H heads, N chunks, C tokens of a chunk, D key or value dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
BASE = 8  # size of the blocks inverted by a power series: its terms stay below C(7, 3) = 35, whatever the keys


def invert_unit_lower(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower triangular `a` [..., C, C]; products only, so that it runs at matmul speed."""
    size, num = BASE, a.shape[-1] // BASE
    blocks = a.unflatten(-1, (num, size)).unflatten(-3, (num, size))  # [..., num, size, num, size]
    x = -torch.stack([blocks[..., i, :, i, :] for i in range(num)], -3)
    eye = torch.eye(size, device=a.device, dtype=a.dtype)
    inverse = eye + x
    for _ in range(2):  # (I + x)(I + x^2)(I + x^4)
        x = x @ x
        inverse = inverse @ (eye + x)
    while num > 1:
        below = torch.stack(
            [
                a[..., (2 * i + 1) * size : (2 * i + 2) * size, 2 * i * size : (2 * i + 1) * size]
                for i in range(num // 2)
            ],
            -3,
        )
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        left = torch.cat([upper, -(lower @ below @ upper)], -2)
        right = torch.cat([torch.zeros_like(upper), lower], -2)
        inverse = torch.cat([left, right], -1)
        size, num = size * 2, num // 2
    return inverse.squeeze(-3)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k, v [B, T, H, D] in float32, q and k already normalised and scaled; g (log decay, <= 0), beta [B, T, H].

    Returns o [B, T, H, D]: `S *= exp(g_t); S += k_t (x) (v_t - S^T k_t) beta_t; o_t = S^T q_t`, from S = 0.
    """
    batch, length, heads, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        parts = prepare(q, k, v, g, beta)
    o = scan(*parts)  # [N, B H, C, D]
    return o.transpose(0, 1).reshape(batch, heads, -1, v.shape[-1]).transpose(1, 2)[:, :length]


def prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """What the chunks can compute without each other's state."""
    pad = -q.shape[1] % CHUNK
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, 0, 0, pad)) for x in (g, beta))
    q, k, v, g, beta = (_chunks(x) for x in (q, k, v, g[..., None], beta[..., None]))
    g, beta = g[..., 0].cumsum(-1), beta[..., 0]
    ones = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device)
    decay = (g[..., :, None] - g[..., None, :]).masked_fill(ones.triu(1), -torch.inf).exp()  # [N, B H, C, C]
    k_beta = k * beta[..., None]
    keys = (k_beta @ k.transpose(-1, -2) * decay).masked_fill(ones.triu(0), 0.0)
    inverse = invert_unit_lower(keys)
    new = inverse @ (v * beta[..., None])
    read = inverse @ (k_beta * g.exp()[..., None])
    inside = q @ k.transpose(-1, -2) * decay
    q = q * g.exp()[..., None]
    k = (k * (g[..., -1:] - g).exp()[..., None]).transpose(-1, -2).contiguous()
    return q, k, new, read, inside, g[..., -1].exp()[..., None, None]


@torch.compiler.disable  # unrolled and compiled, the loop takes minutes to compile and gains little
def scan(q: Tensor, k: Tensor, new: Tensor, read: Tensor, inside: Tensor, last: Tensor) -> Tensor:
    """Carry the state [B H, D, D] over the chunks; everything [N, B H, ...]."""
    with torch.autocast(q.device.type, enabled=False):
        state = q.new_zeros(q.shape[1], q.shape[-1], new.shape[-1])
        out = []
        for n in range(len(q)):
            value = torch.baddbmm(new[n], read[n], state, alpha=-1)
            out.append(torch.baddbmm(q[n] @ state, inside[n], value))
            state = torch.baddbmm(state * last[n], k[n], value)
        return torch.stack(out)


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [N, B H, C, D], contiguous, so that a chunk is one batch of matrices."""
    x = x.unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
