"""Random tiny models laid out on a mesh, its ranks as threads, against one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.configs import DELTA, FULL, LINEAR, MLA
from models.harness import PAGE, Rank, make_rank
from tessera.comm.local import LocalComm, LocalGroup
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE, Mesh
from tessera.core.spec import ModelSpec
from tessera.core.tensors import cache_dtypes, cache_table
from tessera.core.weights import weight_table
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise

R = TypeVar("R")
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


def pairwise(rows: Sequence[tuple[object, ...]]) -> list[int]:
    """Places of few rows that together show every pair of values of two columns that some row shows."""
    pairs = [frozenset(combinations(enumerate(row), 2)) for row in rows]
    left, chosen = frozenset().union(*pairs), []
    while left:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def on_ranks(mesh: Mesh, work: Callable[[LocalComm], R], deadline_s: float = 30.0) -> list[R]:
    """`work` on every rank of a mesh, each in a thread: the results by rank. Raises what the first to fail raised."""
    group = LocalGroup(mesh, deadline_s)
    results: dict[int, R] = {}
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(group.comm(rank))
        except BaseException as error:
            failed.append(error)
            group.fail(rank, error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    group.check()
    return [results[rank] for rank in range(mesh.size)]


def tokens_of(spec: ModelSpec, steps: Sequence[Step]) -> list[list[list[tuple[int, list[int]]]]]:
    """Per step, the ranges of all sequences with their tokens; nested once more so that DP ranks can be told apart."""
    draw = torch.Generator().manual_seed(1)
    return [
        [[(s, torch.randint(0, spec.vocab_size, (n,), generator=draw).tolist())] for s, n in sorted(step.items())]
        for step in steps
    ]


class Outcome:
    """What a layout computed: logits per step and sequence as each rank saw them, and the ranks with their caches."""

    def __init__(self, ranks: list[Rank], logits: list[list[dict[int, Tensor]]]) -> None:
        self.ranks, self.logits = ranks, logits


def compute(spec: ModelSpec, source: Noise, mesh: Mesh, steps: Sequence[Step] = STEPS) -> Outcome:
    """Runs the steps in float64; sequence s belongs to DP rank s % dp."""
    ranges = [[r for one in step for r in one] for step in tokens_of(spec, steps)]
    num_dp = mesh.size_of("dp")

    def work(comm: LocalComm) -> tuple[Rank, list[dict[int, Tensor]]]:
        rank = make_rank(spec, source, torch.float64, mesh, comm.rank, comm, sequences=SEQUENCES, length=LENGTH)
        mine, seen = mesh.coordinate(comm.rank, "dp"), []
        for step in ranges:
            counts = [0] * num_dp
            for s, tokens in step:
                counts[s % num_dp] += len(tokens)
            own = [(s, tokens) for s, tokens in step if s % num_dp == mine]
            parts = rank.run(own, tuple(counts)).split([len(tokens) for _, tokens in own])
            seen.append({s: part for (s, _), part in zip(own, parts, strict=True)})
        return rank, seen

    done = on_ranks(mesh, work)
    return Outcome([rank for rank, _ in done], [seen for _, seen in done])


def differences(spec: ModelSpec, found: Outcome, alone: Outcome, mesh: Mesh) -> dict[str, float]:
    """The largest difference in logits and in what each cache holds of written tokens and states."""
    worst: dict[str, float] = {}

    def note(name: str, a: Tensor, b: Tensor) -> None:
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)} and {tuple(b.shape)}"
        apart = (a - b).abs().nan_to_num(nan=torch.inf).max() if a.numel() else 0.0
        worst[name] = max(worst.get(name, 0.0), float(apart))

    (one,), (expected,) = alone.ranks, alone.logits
    for index, (rank, seen) in enumerate(zip(found.ranks, found.logits, strict=True)):
        for step, whole in zip(seen, expected, strict=True):
            for s, part in step.items():
                note("logits", part, whole[s])
        for cache in cache_table(spec, PAGE, cache_dtypes(spec, "float64")):
            for s in [s for s in range(SEQUENCES) if s % mesh.size_of("dp") == mesh.coordinate(index, "dp")]:
                whole = _held(one, cache.name, s)
                for dim, runs in enumerate(cache.layout.runs(mesh, index)):
                    places = torch.cat([torch.arange(r.start, r.start + r.length) for r in runs])
                    whole = whole.index_select(dim + 1, places)
                note(cache.name, _written(rank, cache, s, _held(rank, cache.name, s)), _written(rank, cache, s, whole))
    return worst


def _held(rank: Rank, name: str, sequence: int) -> Tensor:
    """[pages or 1, ...] of one sequence."""
    pool = rank.caches[name]
    if name.endswith((".kv", ".latent")):
        return pool[torch.from_numpy(rank.tables[sequence]).long()]
    return pool[sequence + 1 : sequence + 2]


def _written(rank: Rank, cache: Any, sequence: int, held: Tensor) -> Tensor:
    """The tokens that were written, first dim tokens; a state as it is."""
    if cache.kind == "slot":
        return held
    dim = [d.name for d in cache.layout.dims].index("token") + 1
    return held.movedim(dim, 1).flatten(0, 1)[: rank.computed[sequence]]
