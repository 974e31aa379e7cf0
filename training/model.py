"""Qwen3.5-MoE and DeepSeek-V2, compact, for training: the mathematics and the tensor names of Hugging Face's models.

Two differences, both without effect on the result: every expert is computed for every token and the unchosen ones are
multiplied by zero (at 16 experts, quicker than sorting), and each expert matrix of a layer is one stacked tensor.
Legend: B sequences, T tokens, M hidden, H heads, D head dim, E experts, I intermediate.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from delta import gated_delta_rule
from torch import Tensor, nn


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    """In float32. `centred` (Qwen3.5): the weight is stored minus one."""

    def __init__(self, dim: int, eps: float, centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if centred else torch.ones(dim))
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * (1 + self.weight) if self.centred else x * self.weight


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, inner),
            linear(hidden, inner),
            linear(inner, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self, num: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(num, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [B, T, M], weights [B, T, E] (zero where not chosen) -> [B, T, M]."""
        inner = F.silu(F.linear(x, self.gate_proj.flatten(0, 1))) * F.linear(x, self.up_proj.flatten(0, 1))
        inner = inner.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None].to(inner.dtype)
        return F.linear(inner.flatten(-2), self.down_proj.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    """`hybrid`: chosen weights sum to one, a gated shared expert. Otherwise (V2): as the softmax gave them, ungated."""

    def __init__(self, c: SimpleNamespace, hybrid: bool) -> None:
        super().__init__()
        self.hybrid, self.top_k = hybrid, c.num_experts_per_tok
        num = c.num_experts if hybrid else c.n_routed_experts
        self.scale = 1.0 if hybrid else c.routed_scaling_factor
        self.gate = linear(c.hidden_size, num)
        self.experts = Experts(num, c.hidden_size, c.moe_intermediate_size)
        if hybrid:
            self.shared_expert = MLP(c.hidden_size, c.shared_expert_intermediate_size)
            self.shared_expert_gate = linear(c.hidden_size, 1)
        else:
            self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, M] -> the same shape, and the balancing loss (Fedus et al. 2021, arXiv:2101.03961)."""
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(x.float(), self.gate.weight).softmax(-1)
        top, index = probs.topk(self.top_k, -1)
        if self.hybrid:
            top = top / top.sum(-1, keepdim=True)
        weights = torch.zeros_like(probs).scatter(-1, index, top * self.scale)
        share = (weights > 0).float().mean((0, 1)) / self.top_k
        balance = probs.shape[-1] * (share * probs.mean((0, 1))).sum()
        routed = self.experts(x, weights)
        if self.hybrid:
            return routed + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x), balance
        return routed + self.shared_experts(x), balance


class GatedDeltaNet(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.nk, self.nv = c.linear_num_key_heads, c.linear_num_value_heads
        self.dk, self.dv, self.kernel = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim
        self.key, self.value = self.nk * self.dk, self.nv * self.dv
        channels = 2 * self.key + self.value
        self.in_proj_qkv, self.in_proj_z = linear(c.hidden_size, channels), linear(c.hidden_size, self.value)
        self.in_proj_b, self.in_proj_a = linear(c.hidden_size, self.nv), linear(c.hidden_size, self.nv)
        self.conv1d = nn.Conv1d(channels, channels, self.kernel, groups=channels, bias=False)
        # a state forgets slowly at first: half-lives from tens to hundreds of tokens, by head
        self.A_log = nn.Parameter(torch.linspace(1.0, 4.0, self.nv).log())
        start = torch.logspace(-3.0, -1.5, self.nv)
        self.dt_bias = nn.Parameter(start + torch.log(-torch.expm1(-start)))
        self.norm = RMSNorm(self.dv, c.rms_norm_eps, centred=False)
        self.out_proj = linear(self.value, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj_qkv(x)
        taps = self.conv1d.weight[:, 0].float()  # [channels, K]
        padded = F.pad(qkv.float(), (0, 0, self.kernel - 1, 0))
        length = x.shape[1]
        qkv = F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(self.kernel)))
        z, beta = self.in_proj_z(x).float(), torch.sigmoid(self.in_proj_b(x).float())
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        q, k, v = qkv.split([self.key, self.key, self.value], -1)
        q, k = (self._normal(part) for part in (q, k))
        o = gated_delta_rule(q * self.dk**-0.5, k, v.unflatten(-1, (self.nv, self.dv)), g, beta)
        o = self.norm(o) * F.silu(z.unflatten(-1, (self.nv, self.dv)))
        return self.out_proj(o.flatten(-2))

    def _normal(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.nk, self.dk))
        x = x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self.nv // self.nk, 2)


def angles(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """[T, dim / 2]"""
    inverse = theta ** -(torch.arange(0, dim, 2, device=device).float() / dim)
    return torch.arange(length, device=device).float()[:, None] * inverse


class GatedAttention(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.rotary = int(c.head_dim * c.partial_rotary_factor)
        self.theta = c.rope_parameters["rope_theta"]
        self.q_proj = linear(c.hidden_size, 2 * self.heads * self.dim)
        self.k_proj = linear(c.hidden_size, self.kv * self.dim)
        self.v_proj = linear(c.hidden_size, self.kv * self.dim)
        self.o_proj = linear(self.heads * self.dim, c.hidden_size)
        self.q_norm, self.k_norm = (RMSNorm(self.dim, c.rms_norm_eps, centred=True) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, gate = self.q_proj(x).unflatten(-1, (self.heads, 2 * self.dim)).chunk(2, -1)
        k, v = (proj(x).unflatten(-1, (self.kv, self.dim)) for proj in (self.k_proj, self.v_proj))
        turn = angles(x.shape[1], self.rotary, self.theta, x.device)
        q, k = self._rope(self.q_norm(q), turn), self._rope(self.k_norm(k), turn)
        group = self.heads // self.kv
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        q, k, v = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)
        return self.o_proj((o * torch.sigmoid(gate)).flatten(-2))

    def _rope(self, x: Tensor, turn: Tensor) -> Tensor:
        a, b, rest = x.split([self.rotary // 2, self.rotary // 2, self.dim - self.rotary], -1)
        cos, sin = turn.cos()[:, None], turn.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class LatentAttention(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.nope, self.rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        self.value, self.rank, self.theta = c.v_head_dim, c.kv_lora_rank, c.rope_parameters["rope_theta"]
        self.q_proj = linear(c.hidden_size, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(c.hidden_size, self.rank + self.rope)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6, centred=False)
        self.kv_b_proj = linear(self.rank, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, c.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        turn = angles(x.shape[1], self.rope, self.theta, x.device)
        q, q_rope = self.q_proj(x).unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], -1)
        k, v = (
            self.kv_b_proj(self.kv_a_layernorm(latent))
            .unflatten(-1, (self.heads, -1))
            .split([self.nope, self.value], -1)
        )
        q_rope, k_rope = self._rope(q_rope, turn), self._rope(k_rope[:, :, None], turn).expand_as(q_rope)
        q, k = torch.cat([q, q_rope.to(q.dtype)], -1), torch.cat([k, k_rope.to(k.dtype)], -1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)
        return self.o_proj(o.flatten(-2))

    def _rope(self, x: Tensor, turn: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turn.cos()[:, None], turn.sin()[:, None]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class Layer(nn.Module):
    """`kind`: `linear_attention`, `full_attention` (both Qwen3.5), `dense` or `moe` (DeepSeek-V2)."""

    def __init__(self, c: SimpleNamespace, kind: str) -> None:
        super().__init__()
        self.kind, hybrid = kind, kind.endswith("attention")
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, centred=hybrid)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, centred=hybrid)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = GatedAttention(c) if hybrid else LatentAttention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if kind == "dense" else MoE(c, hybrid)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, M] -> the same shape, and the router's balancing loss; `mask` [B, 1, T, T] if not just causal."""
        normed = self.input_layernorm(x)
        x = x + (self.linear_attn(normed) if self.kind == "linear_attention" else self.self_attn(normed, mask))
        normed = self.post_attention_layernorm(x)
        if self.kind == "dense":
            return x + self.mlp(normed), x.new_zeros(())
        out, balance = self.mlp(normed)
        return x + out, balance


class Trunk(nn.Module):
    def __init__(self, c: SimpleNamespace, kinds: list[str], hybrid: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in kinds)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, centred=hybrid)


class Drafter(nn.Module):
    """The head that drafts token t+2 from the normed hidden state at t and the embedding of token t+1.

    `fc` takes [embedding, hidden], as vLLM's and SGLang's `qwen3_next_mtp` concatenate them.
    """

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            RMSNorm(c.hidden_size, c.rms_norm_eps, centred=True) for _ in range(3)
        )
        self.fc = linear(2 * c.hidden_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c, "full_attention")])

    def forward(self, hidden: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, T, M]; following [B, T, M]: embeddings of the tokens one further on."""
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(following), self.pre_fc_norm_hidden(hidden)], -1))
        x, balance = self.layers[0](x.float())
        return self.norm(x), balance


class Model(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = SimpleNamespace(**config)
        hybrid = c.model_type.startswith("qwen3_5")
        if hybrid:
            kinds = c.layer_types
        else:
            kinds = ["dense" if i < c.first_k_dense_replace else "moe" for i in range(c.num_hidden_layers)]
        self.model = Trunk(c, kinds, hybrid)
        self.lm_head = linear(c.hidden_size, c.vocab_size)
        self.mtp = Drafter(c) if hybrid and c.mtp_num_hidden_layers else None
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
        elif isinstance(module, Experts):
            for weight in module.parameters():
                nn.init.normal_(weight, std=0.5 / math.sqrt(weight.shape[-1]))

    def forward(self, tokens: Tensor, topics: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """tokens [B, T + 2] -> logits of tokens 1..T [B, T, V], drafts of tokens 2..T+1 [B, T, V], balancing loss.

        With `topics` [B, T + 2], the trunk's attention sees the tokens of the same topic alone.

        The drafter learns from the trunk and leaves it alone: its inputs and the head are detached.
        """
        embedded = self.model.embed_tokens(tokens)
        x, losses = embedded[:, :-2].contiguous(), []
        mask = None
        if topics is not None:
            own = topics[:, :-2]
            mask = (own[:, :, None] == own[:, None]).tril()[:, None]
        for layer in self.model.layers:
            x, loss = layer(x, mask)
            losses.append(loss)
        x = self.model.norm(x)
        drafts = None
        if self.mtp is not None:
            y, loss = self.mtp(x.detach(), embedded[:, 1:-1].detach())
            losses.append(loss)
            drafts = F.linear(y, self.lm_head.weight.detach())
        return self.lm_head(x), drafts, torch.stack(losses).mean()
