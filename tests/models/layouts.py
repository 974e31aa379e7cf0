"""Random tiny models laid out on a mesh, compared with one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import torch
from torch import Tensor

from models.configs import DELTA, FULL, LINEAR, MLA
from models.harness import PAGE, Rank, make_rank
from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.spec import ModelSpec
from tessera.core.tensors import CacheSpec, cache_dtypes, cache_table
from tessera.core.weights import weight_table
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.models.source import Source

Step = dict[int, int]  # sequence -> how many of its tokens

FAMILIES = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "deepseek_v2",
    "deepseek_v3",
)
SEQUENCES, LENGTH = 4, 24
# Ranks that are idle, prefill, decode and do both in one step; ranges of one token; an end inside a page.
STEPS: tuple[Step, ...] = ({0: 7}, {0: 1, 1: 9, 3: 2}, {1: 1, 2: 5}, {0: 1, 1: 1, 2: 1, 3: 1}, {3: 6}, {2: 1, 1: 3})


def random_config(family: str, seed: int) -> dict[str, Any]:
    """A config.json whose heads, experts and widths can be cut for four ranks; KV heads for fewer."""
    pick = Random(f"{family} {seed}").choice
    heads = pick((4, 8))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": pick((61, 64, 67)),
        "hidden_size": pick((24, 40)),
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "intermediate_size": pick((16, 20)),
        "num_attention_heads": heads,
        "num_key_value_heads": pick((1, 2, 4)),
        "head_dim": 8,
        "tie_word_embeddings": pick((True, False)),
        "dtype": "float64",
    }
    moe = {
        "num_experts": pick((4, 8)),
        "num_experts_per_tok": pick((2, 3)),
        "moe_intermediate_size": pick((8, 12)),
        "norm_topk_prob": pick((True, False)),
    }
    if family in ("llama", "qwen3"):
        return config
    if family == "qwen3_moe":
        return {**config, **moe, "mlp_only_layers": pick(([], [1]))}
    if family.startswith("deepseek"):
        v3 = family == "deepseek_v3"
        routed = {"n_routed_experts": 8, "norm_topk_prob": v3, "n_group": pick((1, 4)), "topk_group": 1}
        routed |= {"q_lora_rank": pick((None, 12)), "n_shared_experts": pick((0, 2)), "first_k_dense_replace": 1}
        return {**config, **MLA, **moe, **routed, "num_hidden_layers": 3, "num_attention_heads": heads}
    values = pick((4, 8))
    hybrid = {**DELTA, "linear_num_key_heads": pick((1, 2, values)), "linear_num_value_heads": values}
    hybrid |= {"layer_types": pick(([LINEAR, FULL], [FULL, LINEAR])), "head_dim": 16}
    return {**config, **hybrid} if family == "qwen3_5_text" else {**config, **hybrid, **moe}


@lru_cache(maxsize=4)
def spec_and_noise(family: str, seed: int) -> tuple[ModelSpec, Noise]:
    """The model and its random weights."""
    spec = read_spec(random_config(family, seed))
    return spec, Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, seed)


def tokens_of(spec: ModelSpec, steps: Sequence[Step]) -> list[list[tuple[int, list[int]]]]:
    """Per step, the sequences with their tokens."""
    draw = torch.Generator().manual_seed(1)
    return [
        [(s, torch.randint(0, spec.vocab_size, (n,), generator=draw).tolist()) for s, n in sorted(step.items())]
        for step in steps
    ]


@dataclass(frozen=True)
class Outcome:
    """What one rank computed: its caches, and logits per step of the sequences that it has."""

    rank: Rank
    logits: list[dict[int, Tensor]]


def compute(comm: Comm, spec: ModelSpec, source: Source, steps: Sequence[Step] = STEPS) -> Outcome:
    """Runs the steps in float64 on one rank of `comm.mesh`; sequence s belongs to DP rank s % dp."""
    mesh = comm.mesh
    rank = make_rank(spec, source, torch.float64, mesh, comm.rank, comm, sequences=SEQUENCES, length=LENGTH)
    num_dp, mine, seen = mesh.size_of("dp"), mesh.coordinate(comm.rank, "dp"), []
    for step in tokens_of(spec, steps):
        counts = [sum(len(tokens) for s, tokens in step if s % num_dp == dp) for dp in range(num_dp)]
        own = [(s, tokens) for s, tokens in step if s % num_dp == mine]
        parts = rank.run(own, tuple(counts)).split([len(tokens) for _, tokens in own])
        seen.append({s: part for (s, _), part in zip(own, parts, strict=True)})
    return Outcome(rank, seen)


@lru_cache(maxsize=2)
def alone(family: str, seed: int) -> Outcome:
    """What one rank computes of a random model."""
    return compute(Alone(), *spec_and_noise(family, seed))


def compare(comm: Comm, family: str, seed: int) -> dict[str, float]:
    """Computes on one rank of a mesh: the largest differences from one rank alone."""
    spec, source = spec_and_noise(family, seed)
    return differences(spec, compute(comm, spec, source), alone(family, seed), comm)


def differences(spec: ModelSpec, found: Outcome, one: Outcome, comm: Comm) -> dict[str, float]:
    """The largest difference in logits and in what each cache holds of written tokens and states."""
    worst: dict[str, float] = {}
    mesh, at = comm.mesh, comm.rank

    def note(name: str, a: Tensor, b: Tensor) -> None:
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} and {tuple(b.shape)}"
        apart = (a - b).abs().nan_to_num(nan=torch.inf).max() if a.numel() else 0.0
        worst[name] = max(worst.get(name, 0.0), float(apart))

    for step, whole in zip(found.logits, one.logits, strict=True):
        for s, part in step.items():
            note("logits", part, whole[s])
    for cache in cache_table(spec, PAGE, cache_dtypes(spec, "float64")):
        for s in [s for s in range(SEQUENCES) if s % mesh.size_of("dp") == mesh.coordinate(at, "dp")]:
            whole = _held(one.rank, cache, s)
            for dim, runs in enumerate(cache.layout.runs(mesh, at)):
                places = torch.cat([torch.arange(r.start, r.start + r.length) for r in runs])
                whole = whole.index_select(dim + 1, places)
            computed = found.rank.computed[s]
            assert computed == one.rank.computed[s]
            note(cache.name, *(_written(cache, computed, held) for held in (_held(found.rank, cache, s), whole)))
    return worst


def _held(rank: Rank, cache: CacheSpec, sequence: int) -> Tensor:
    """[pages or 1, ...] of one sequence."""
    pool = rank.caches[cache.name]
    if cache.kind == "page":
        return pool[torch.from_numpy(rank.tables[sequence]).long()]
    return pool[sequence + 1 : sequence + 2]


def _written(cache: CacheSpec, computed: int, held: Tensor) -> Tensor:
    """The tokens that were written, first dim tokens; a state as it is."""
    if cache.kind == "slot":
        return held
    dim = [d.name for d in cache.layout.dims].index("token") + 1
    return held.movedim(dim, 1).flatten(0, 1)[:computed]
