"""The least time that a card needs for a step: bytes over bandwidth, operations over the rate of products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from tessera.core.config.types import Config
from tessera.core.scales import tile_bytes
from tessera.core.spec import AttentionSpec, DeltaSpec, MLASpec, ModelSpec, MoESpec
from tessera.core.tensors import wide_dtype
from tessera.core.weights import weight_table

COPIED = 1 << 31
SIDE = 8192
TURNS = 10


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step. `weights`: bytes that any step reads (one row of the embedding besides); `token_bytes`: of keys and
    values of a position, all layers; `slot_bytes`: of a sequence's states; `flops`: of a token without attention;
    `pair_flops`: of a query and a key, all layers."""

    weights: float
    token_bytes: float
    slot_bytes: float
    flops: float
    pair_flops: float


@dataclass(frozen=True, slots=True)
class Card:
    """What was measured of a device: a copy (bytes read and written), and a product of bfloat16 matrices."""

    name: str
    bytes_per_s: float
    flops_per_s: float

    def seconds_of_decode(self, work: Work, sequences: int, context: int) -> float:
        """One token for each of `sequences`, that stand at `context`. States are read and written."""
        moved = work.weights + sequences * (context * work.token_bytes + 2 * work.slot_bytes)
        return max(moved / self.bytes_per_s, sequences * work.flops / self.flops_per_s)

    def seconds_of_prompts(self, work: Work, sequences: int, length: int) -> float:
        """All tokens of `sequences` prompts."""
        pairs = length * (length + 1) / 2
        return sequences * (length * work.flops + pairs * work.pair_flops) / self.flops_per_s


def measure_card() -> Card:
    """Measures the current CUDA device, and leaves its memory as it was: an engine takes a share of what is free."""
    card = _measured()
    torch.cuda.empty_cache()
    return card


def _measured() -> Card:
    a, b = (torch.empty(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    x, y = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied, multiplied = _seconds(lambda: b.copy_(a)), _seconds(lambda: x @ y)
    return Card(torch.cuda.get_device_name(), 2 * COPIED / copied, 2 * SIDE**3 / multiplied)


def _seconds(work: Callable[[], Any]) -> float:
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TURNS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / TURNS


def work_of(spec: ModelSpec, config: Config, experts: float) -> Work:
    """The work of a step in which every MoE layer reads `experts` experts."""
    moes = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec)]
    of_one = max((m.router.num_experts for m in moes), default=1)
    chosen = max((m.router.top_k for m in moes), default=0)
    mesh, dtype = config.mesh.mesh, config.model.dtype
    always, routed = [0, 0], [0, 0]  # bytes, elements
    for tensor in weight_table(spec, mesh, quantization=config.model.quantization):
        if tensor.role != "embedding" or spec.tied:
            kind = routed if tensor.role == "experts" else always
            kind[0] += tile_bytes(tensor, mesh, 0, wide_dtype(dtype) if tensor.wide else dtype)
            kind[1] += prod(tensor.layout.local_shape(mesh, 0))
    memory = config.memory
    return Work(
        weights=always[0] + routed[0] * experts / of_one,
        token_bytes=memory.page_bytes / memory.page_size,
        slot_bytes=memory.slot_bytes,
        flops=2 * (always[1] + routed[1] * chosen / of_one),
        pair_flops=sum(_pair(layer.mixer) for layer in spec.layers),
    )


def _pair(mixer: object) -> float:
    """Operations of a query and a key: two products."""
    if isinstance(mixer, AttentionSpec):
        return 4.0 * mixer.num_heads * mixer.head_dim
    if isinstance(mixer, MLASpec):
        return 2.0 * mixer.num_heads * (mixer.query_dim + mixer.value_dim)
    assert isinstance(mixer, DeltaSpec)
    return 0.0
