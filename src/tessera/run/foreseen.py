"""The steps that will come, run on tensors without memory ("meta"): for what they launch, not for what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch

from tessera.comm.alone import Alone
from tessera.core.config.types import Config
from tessera.core.spec import ModelSpec
from tessera.core.tensors import cache_table
from tessera.core.weights import weight_table
from tessera.ops.backend import Backend
from tessera.ops.segments import make_segments
from tessera.run.batch import Input
from tessera.run.build import Driven, load_decoder
from tessera.run.graphs import Graphs, Results, Size
from tessera.run.pools import Pools
from tessera.run.table import RowTable

Ranges = tuple[tuple[int, int], ...]  # (start, length) of each
LENGTHS = (5, 20, 100, 700)  # of ranges side by side: attention has kernels and forms of its own for each
PREFIX = 1024  # tokens before ranges that go on
NOWHERE = torch.device("meta")


def foreseen(config: Config) -> Iterator[Ranges | Size]:
    """Steps as they are, and sizes of recorded ones, the likeliest first.

    A kernel is another one for other tiles, which follow from counts of tokens and ranges by steps of two at most, so
    powers of two stand for what lies between them; and not from both at once.
    """
    sizes, scheduling = config.kernels.graphs, config.scheduling
    most = max(scheduling.chunk_size, scheduling.alone_size) or config.model.context_length
    rows, whole = scheduling.max_running, _doubling(2, most)
    yield ((0, 1),)
    for tokens in (*whole, *_between(whole)):
        yield ((0, tokens),)
    for count in dict.fromkeys(n for n in (1, 2, 3, 4, *sizes.rows, rows) if n <= rows):
        yield ((PREFIX, 1),) * count
    for size in sizes.rows:
        yield Size(size, size, one_each=True)
    yield from (Size(segments, tokens) for segments in sizes.segments[:1] for tokens in sizes.tokens)
    yield from (Size(segments, tokens) for segments in sizes.segments for tokens in sizes.tokens[-1:])
    for tokens in (*whole, *_between(whole)):
        yield from (((PREFIX, tokens // count),) * count for count in (1, 4, 16) if count <= min(rows, tokens))
        for count in (1, 16, 64):
            if count < min(rows, tokens):
                yield ((0, tokens - count), *((PREFIX, 1),) * count)
    for start in (PREFIX, 0):
        for length in LENGTHS:
            yield from (((start, length),) * count for count in _doubling(1, min(rows, most // length)))
    yield from (Size(segments, tokens) for segments in sizes.segments[1:] for tokens in sizes.tokens[:-1])


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... and last; nothing where that is less than first."""
    return [first << n for n in range(40) if first << n < last] + [last] * (first <= last)


def _between(numbers: list[int]) -> list[int]:
    """What lies in the middle of neighbours."""
    return [sum(pair) >> 1 for pair in pairwise(numbers) if sum(pair) >> 1 not in pair]


class Dry:
    """The model of a rank without weights, of whose layers one of each kind runs."""

    def __init__(self, config: Config, spec: ModelSpec, backend: Backend, rank: int = 0) -> None:
        mesh, memory, rows = config.mesh.mesh, config.memory, config.scheduling.max_running
        decoder, _ = load_decoder(config, spec, None, backend, rank, Alone(mesh, rank), NOWHERE, None)
        decoder.layers = [decoder.layers[i] for i in kinds(config, spec)]
        self._model, self._page_size = Driven(decoder), memory.page_size
        self._dp, self._num_dp = mesh.coordinate(rank, "dp"), mesh.size_of("dp")
        self._pools = Pools(cache_table(spec, memory.page_size, memory.dtypes), 2, 2, NOWHERE, mesh, rank).tensors
        table = RowTable(rows, config.model.context_length, memory.page_size, spec.eos, NOWHERE, mirror_pages=True)
        args = (self._model, table, self._pools, memory.page_size, backend.expand, backend.greedy, Once(), self._num_dp)
        self._graphs = Graphs(config.kernels.graphs, *args)

    @torch.inference_mode()
    def run(self, step: Ranges | Size) -> None:
        """Launches what a step would: where all DP ranks have as much to do, and where the others have nothing."""
        if isinstance(step, Size):
            self._graphs.rehearse(step)
            return
        for others in dict.fromkeys(((step,) * (self._num_dp - 1), ((),) * (self._num_dp - 1))):
            self.launch(step, others)

    @torch.inference_mode()
    def launch(self, ranges: Ranges, others: tuple[Ranges, ...]) -> None:
        """Launches what a step of `ranges` would, with those of `others` on the other DP ranks."""
        starts, lengths = np.array(ranges, np.int32).reshape(-1, 2).T
        pages = np.zeros((len(ranges), -(-int((starts + lengths).max(initial=0)) // self._page_size)), np.int32)
        segments = make_segments(starts, lengths, pages, np.zeros_like(starts), self._page_size, NOWHERE)
        tokens = torch.empty(segments.num_tokens, dtype=torch.int32, device=NOWHERE)
        all_ranks = (*others[: self._dp], ranges, *others[self._dp :])
        counts = tuple(sum(length for _, length in each) for each in all_ranks)
        hidden = self._model.forward((Input(tokens, segments, counts),), self._pools)
        self._model.logits(hidden[segments.starts], tuple(len(each) for each in all_ranks))


def kinds(config: Config, spec: ModelSpec) -> list[int]:
    """The first layer of each kind: alike in all that a kernel could be compiled for."""
    tensors: dict[str, list[str]] = {}
    for tensor in weight_table(spec, config.mesh.mesh, quantization=config.model.quantization):
        number, _, name = tensor.name.removeprefix("layers.").partition(".")
        tensors.setdefault(number, []).append(f"{name} {tensor.role} {tensor.block}")
    first: dict[str, int] = {}
    for i, layer in enumerate(spec.layers):
        first.setdefault(f"{layer} {tensors[str(i)]}", i)
    return list(first.values())


class Once:
    """A `Recorder` that records nothing."""

    def warm(self, stage: Callable[[], Results]) -> None:
        """See `Recorder`."""
        stage()

    def capture(self, stage: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """See `Recorder`: the same again."""
        return stage(), lambda: None
