"""Runs a `Decoder` over pages and slots without the run room: one sequence or several, in ranges of any length."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.base import Comm
from tessera.comm.waits import drain
from tessera.core.mesh import SINGLE, Mesh
from tessera.core.parts import NOTHING, Wide
from tessera.core.spec import ModelSpec
from tessera.core.tensors import CacheSpec, cache_dtypes, cache_table
from tessera.core.weights import weight_table
from tessera.models.build import build_model
from tessera.models.decoder import Decoder
from tessera.models.load import load_weights
from tessera.models.source import Source
from tessera.ops.backend import TORCH, Backend
from tessera.ops.segments import make_segments

PAGE = 4


@dataclass
class Rank:
    """A model on one rank with pools for `sequences` sequences of up to `length` tokens, pages in a scattered order."""

    spec: ModelSpec
    decoder: Decoder
    caches: dict[str, Tensor]
    tables: np.ndarray
    computed: list[int] = field(default_factory=list)

    def run(self, ranges: list[tuple[int, list[int]]], counts: tuple[int, ...] | None = None) -> Tensor:
        """Computes the next tokens of some sequences, in one step: logits [T, V] of all of them.

        `counts`: tokens of every DP rank in this step; this one may have none.
        """
        sequences = np.array([s for s, _ in ranges], np.int32)
        starts = np.array([self.computed[s] for s in sequences], np.int32)
        lengths = np.array([len(tokens) for _, tokens in ranges], np.int32)
        segments = make_segments(starts, lengths, self.tables[sequences], sequences + 1, PAGE)
        flat = torch.tensor([t for _, tokens in ranges for t in tokens], dtype=torch.int32)
        with torch.inference_mode():
            hidden = drain(self.decoder.hidden(flat, segments, self.caches, counts))
            logits = self.decoder.logits(hidden, counts)
        for s, tokens in ranges:
            self.computed[s] += len(tokens)
        return logits

    def chunks(self, sequence: int, tokens: list[int], size: int) -> Tensor:
        """Computes `tokens` in ranges of `size`: logits [T, V]."""
        return torch.cat([self.run([(sequence, tokens[i : i + size])]) for i in range(0, len(tokens), size)])


def make_rank(
    spec: ModelSpec,
    source: Source,
    dtype: torch.dtype = torch.float32,
    mesh: Mesh = SINGLE,
    rank: int = 0,
    comm: Comm | None = None,
    backend: Backend = TORCH,
    sequences: int = 2,
    length: int = 160,
    padded_up_to: int = 6,
    wide: Wide = NOTHING,
) -> Rank:
    """Loads a rank's weights from `source` and makes its pools. `padded_up_to`: so that steps take either way."""
    table = weight_table(spec, mesh, quantization=spec.quantization)
    packs = {"pack_linear": backend.pack, "pack_fp8": backend.pack_fp8, "wide_sums": wide.sums}
    tiles = load_weights(source, table, mesh, rank, dtype, **packs)
    decoder = build_model(spec, mesh, rank, tiles, comm or Alone(), backend, length, padded_up_to, wide)
    pages = -(-length // PAGE)
    dtypes = cache_dtypes(spec, str(dtype).removeprefix("torch."))
    caches = {c.name: _pool(c, mesh, rank, pages, sequences) for c in cache_table(spec, PAGE, dtypes)}
    shuffled = np.random.default_rng(0).permutation(sequences * pages) + 1
    return Rank(spec, decoder, caches, shuffled.reshape(sequences, pages).astype(np.int32), [0] * sequences)


def _pool(cache: CacheSpec, mesh: Mesh, rank: int, pages: int, sequences: int) -> Tensor:
    count = 1 + sequences * (pages if cache.kind == "page" else 1)
    shape = (count, *cache.layout.local_shape(mesh, rank))
    dtype = getattr(torch, cache.dtype)
    # Pages hold rubbish until they are written; a sequence's slot starts from nothing.
    return torch.randn(shape).to(dtype) if cache.kind == "page" else torch.zeros(shape, dtype=dtype)
