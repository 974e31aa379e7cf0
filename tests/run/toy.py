"""A model of a few lines whose every token depends on everything before it, through pages and through a slot.

Pages hold the tokens, the slot a running hash of them; the logits are noise seeded with both. Who reads a wrong page,
a stale slot or a wrong position gets other tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tessera.core.layout import Layout, whole
from tessera.core.messages import SamplingParams
from tessera.core.tensors import CacheSpec
from tessera.ops.sample import draw_reference
from tessera.ops.segments import Segments
from tessera.run.batch import Input
from tessera.run.host import Executor
from tessera.run.pools import Pools
from tessera.run.rowparams import RowParams
from tessera.run.runner import Runner
from tessera.run.sampler import Sampler
from tessera.run.table import RowTable

MODULUS = 1_000_003


def toy_caches(page_size: int) -> tuple[CacheSpec, ...]:
    """Tokens by page, a running hash by slot."""
    return (
        CacheSpec("toy.tokens", "page", Layout((whole("token", page_size),)), "float64"),
        CacheSpec("toy.hash", "slot", Layout((whole("hash", 1),)), "float64"),
    )


class Toy:
    """`forward` gives [hash of the pages read, hash in the slot] per token; `logits` seeds noise with them."""

    def __init__(self, vocab_size: int = 50) -> None:
        self.vocab_size = vocab_size
        self.steps = 0

    def forward(self, inputs: tuple[Input, ...], caches: dict[str, Tensor]) -> Tensor:
        """One token at a time, as plainly as can be."""
        self.steps += 1
        return torch.cat([self._part(i.tokens, i.segments, caches) for i in inputs])

    def _part(self, tokens: Tensor, segments: Segments, caches: dict[str, Tensor]) -> Tensor:
        pool, slots = caches["toy.tokens"], caches["toy.hash"]
        pool[segments.write_page, segments.write_offset] = tokens.to(pool.dtype)
        hidden = torch.zeros(len(tokens), 2, dtype=torch.float64, device=pool.device)
        for t, (s, position) in enumerate(zip(segments.rows.tolist(), segments.positions.tolist(), strict=True)):
            pages = segments.page_table[s].long()
            read = pool[pages].flatten()[: position + 1].cpu().tolist()
            slot = int(segments.slots[s])
            state = (float(slots[slot, 0]) * 31 + int(tokens[t]) + 7) % MODULUS
            slots[slot, 0] = state
            hidden[t] = torch.tensor([float(plain_hash(read)), state])
        return hidden

    def logits(self, hidden: Tensor, counts: tuple[int, ...]) -> Tensor:
        """[N, 2] -> [N, vocab] float64."""
        rows = [plain_logits(int(a), int(b), self.vocab_size) for a, b in hidden.tolist()]
        return torch.tensor(np.stack(rows), device=hidden.device)


def plain_hash(tokens: list[float]) -> int:
    """The polynomial hash of tokens that the slot keeps as well."""
    value = 0
    for token in tokens:
        value = (value * 31 + int(token) + 7) % MODULUS
    return value


def plain_logits(pages: int, slot: int, vocab_size: int) -> np.ndarray:
    """Noise that both hashes seed."""
    return np.random.default_rng([pages, slot]).normal(size=vocab_size) * 3


def history_logits(tokens: list[int], vocab_size: int = 50) -> np.ndarray:
    """The logits after `tokens`, computed from nothing."""
    value = plain_hash([float(t) for t in tokens])
    return plain_logits(value, value, vocab_size)


def greedy(prompt: list[int], count: int, vocab_size: int = 50) -> list[int]:
    """The toy's greedy answer, computed from nothing."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(history_logits(tokens, vocab_size).argmax()))
    return tokens[len(prompt) :]


def toy_runner(
    rows: int = 4,
    max_context: int = 64,
    page_size: int = 4,
    num_pages: int = 64,
    num_slots: int = 0,
    eos: tuple[int, ...] = (),
    executor: Executor | None = None,
    device: str = "cpu",
) -> Runner:
    """A runner of the toy, in debug mode. `num_slots` 0: one per row."""
    table = RowTable(rows, max_context, page_size, eos, device)
    params = RowParams(rows, device)
    pools = Pools(toy_caches(page_size), num_pages, num_slots or rows + 1, device)
    sampler = Sampler(table, params, draw_reference)
    return Runner(Toy(), table, params, pools, sampler, page_size, executor, debug=True)


PLAIN = SamplingParams(temperature=0.0, max_new_tokens=8)
