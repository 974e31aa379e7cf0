"""Steps as CUDA graphs: all launches of a padded size are recorded once and replayed for every step that fits.

A step of whatever ranges is columns of numbers (`ops/expand.py`); from them the device derives what each token needs,
runs the layers and the head, and draws the likeliest token of every range. Sizes are recorded while the engine serves,
between steps (`recordings.py` says when); a step of a size that is not runs as it is. Recording runs the layers once on
padding alone, which reads and writes scratch rows, pages and slots.

The halves of a step are one graph: what each launches on its way, in turns, and its collectives on the streams of the
backend, which fork from the recorded stream and join it again where a half waits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.comm.alone import Alone
from tessera.comm.rehearsal import Rehearsing
from tessera.core.config.memory import gib
from tessera.core.config.needs import Sketch
from tessera.core.config.types import GraphSizes
from tessera.models.activations import FRAGMENTS, recorded_bytes
from tessera.ops.expand import Columns, Expanded
from tessera.ops.segments import Segments
from tessera.ops.upload import staged
from tessera.plan.step import NO_INTS, Ints, Part, Step
from tessera.run.batch import Input, Model
from tessera.run.table import RowTable

SPARE = 64 << 20  # bytes that are left free beside a recording, for CUDA's own
LAYER_BYTES = 128 << 10  # that CUDA keeps for a layer's launches in a graph

Expand = Callable[[Columns, int, Tensor, Tensor, int], Expanded]
Greedy = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """Padded counts of a step, or of each of its `num_halves`. `one_each`: every range is of one token (equal counts
    alone do not say so)."""

    num_segments: int
    num_tokens: int
    one_each: bool = False
    num_halves: int = 1

    @property
    def all_tokens(self) -> int:
        """Those of all halves."""
        return self.num_tokens * self.num_halves


def padded(step: Step, sizes: GraphSizes) -> Size | None:
    """The size that all parts of a step, or of both of its halves, fit in; None: it does not run as a graph.

    Prompts to be scored need the logits of many positions, which no size holds.
    """
    if not step.num_tokens or any((part.num_logits > part.samples).any() for part in step.parts):
        return None
    halves = step.halves
    parts = [part for half in halves for part in half.parts]
    num_segments = max(len(part.rows) for part in parts)
    num_tokens = max(part.num_tokens for part in parts)
    if all((part.lengths == 1).all() for part in parts):
        size = _at_least(sizes.rows, num_segments)
        return Size(size, size, True, len(halves)) if size else None
    segments = _at_least(sizes.segments, num_segments + 1)  # one is padding, which tokens of no range count to
    tokens = _at_least(sizes.tokens, num_tokens)
    return Size(segments, tokens, False, len(halves)) if segments and tokens else None


def _at_least(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of `sizes` that is no smaller; 0: there is none."""
    at = bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else 0


def columns_of(parts: Sequence[Part], size: Size, slots: Ints, scratch_row: int) -> Ints:
    """The packed columns of the halves of a part, or of all of it (see `Columns`), one after the other, padded to
    `size`; `slots` by row of the row table.

    Where every range is of one token the padding is too: then a token's number is that of its range.
    """
    return np.concatenate([_columns(part, size, slots, scratch_row) for part in parts])


def _columns(part: Part, size: Size, slots: Ints, scratch_row: int) -> Ints:
    count, total = len(part.rows), size.num_segments
    packed = np.zeros(Columns.size(total), np.int32)
    rows, starts, lengths, own, draws, cu = (packed[place] for place in Columns.places(total))
    rows[:count], rows[count:] = part.rows, scratch_row
    starts[:count] = part.starts
    lengths[:count], lengths[count:] = part.lengths, int(size.one_each)
    own[:count] = slots[part.rows]
    draws[:] = scratch_row
    draws[:count][part.samples] = part.rows[part.samples]
    np.cumsum(lengths, out=cu[1:])
    return packed


def places_of(parts: Sequence[Part], size: Size) -> Ints:
    """Where the ranges that draw are among the padded ones of all halves, in order."""
    found = [np.flatnonzero(part.samples) + size.num_segments * i for i, part in enumerate(parts)]
    return np.concatenate(found).astype(np.int32)


def graph_bytes(sketch: Sketch) -> int:
    """Bytes of all graphs: the memory that they share, which holds the largest step of a graph and its logits, and what
    CUDA keeps for the launches of each."""
    sizes = sketch.kernels.graphs
    if not sketch.graphed:
        return 0
    ranges, tokens = max((*sizes.rows, *sizes.segments), default=0), max((*sizes.rows, *sizes.tokens), default=0)
    halves = 2 if 0 < sketch.split_from <= 2 * tokens else 1  # of such a size each
    shared = recorded_bytes(sketch, halves * tokens)
    logits = 3 * halves * ranges * sketch.spec.vocab_size * sketch.element
    num_graphs = len(sizes.rows) + len(sizes.segments) * len(sizes.tokens)
    return shared + logits + num_graphs * len(sketch.spec.layers) * LAYER_BYTES


@dataclass(frozen=True, slots=True)
class Recorded:
    """A size that can be run: fill `columns`, call `run`, read `tokens` [S] (the likeliest) and `logits` [S, G, W], S
    the ranges of all halves."""

    columns: Tensor
    tokens: Tensor
    logits: Tensor
    run: Callable[[], None]


Results = tuple[Tensor, Tensor]


class Recorder(Protocol):
    """Makes a run of something that reads and writes fixed tensors. Both may raise `torch.OutOfMemoryError`."""

    def warm(self, stage: Callable[[], Results]) -> None:
        """Runs `stage` as it is, where it will be recorded: kernels are compiled and handles made."""

    def capture(self, stage: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """What `stage` gives, and a call that computes it anew into the same tensors. On a device nothing runs yet."""


class CudaGraphs:
    """Records with CUDA graphs, which share one pool of memory, their logits too: they run one after the other.

    Whether there is memory is asked before a capture begins: one that fails half way may leave streams that it forked,
    and then PyTorch's allocator believes for good that it is still under way. `kept`: bytes that are left free for
    steps, of which none may fail because graphs took what it needs.
    """

    def __init__(self, kept: int = 0) -> None:
        self._kept = kept
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._needed = self._pooled = 0  # bytes that the last run held, and that the largest recorded one did

    def __call__(self, stage: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Both, for a rank that is alone or knows that there is memory."""
        self.warm(stage)
        return self.capture(stage)

    def warm(self, stage: Callable[[], Results]) -> None:
        """See `Recorder`."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            with torch.cuda.stream(self._stream):
                stage()
        finally:  # also of a stage that had no memory: what was launched still reads what is given up now
            torch.cuda.current_stream().wait_stream(self._stream)
        self._needed = torch.cuda.max_memory_allocated() - before

    def capture(self, stage: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """See `Recorder`."""
        self._check()
        graph, missing = torch.cuda.CUDAGraph(), None
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):
                try:
                    tokens, logits = stage()
                except torch.OutOfMemoryError as error:  # ending such a capture may fail too, with less to say
                    missing = error
                    raise
        except RuntimeError as error:
            graph.reset()
            torch.cuda.empty_cache()
            if missing is None and "out of memory" in str(error):  # said by CUDA itself
                missing = torch.OutOfMemoryError(str(error))
            raise missing or error from None
        finally:
            missing = None  # a frame that its own traceback holds: tensors of the stage would live until the collector
        self._pool, self._pooled = graph.pool(), max(self._pooled, self._needed)
        return (tokens, lent(logits)), graph.replay

    def _check(self) -> None:
        torch.cuda.empty_cache()
        wanted = int(max(self._needed - self._pooled, 0) * FRAGMENTS) + SPARE
        free, whole = torch.cuda.mem_get_info()
        if free < wanted + self._kept:
            besides = f", {gib(self._kept)} of them for steps" if self._kept else ""
            raise torch.OutOfMemoryError(f"{gib(wanted)} are needed. {gib(free)} of {gib(whole)} are free{besides}")


def lent(tensor: Tensor) -> Tensor:
    """The same memory, not kept: graphs that are recorded later may use it too.

    What reads a graph's logits is launched right after it, before any other graph runs. Kept, those of all sizes would
    take gigabytes with a large vocabulary.
    """
    size = tensor.element_size()
    interface = {
        "shape": tuple(tensor.shape), "strides": tuple(size * stride for stride in tensor.stride()),
        "typestr": f"<i{size}", "data": (tensor.data_ptr(), False), "version": 3,
    }  # fmt: skip
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device=tensor.device).view(tensor.dtype)


class Graphs:
    """The recorded sizes of one rank."""

    def __init__(
        self,
        sizes: GraphSizes,
        model: Model,
        table: RowTable,
        caches: dict[str, Tensor],
        page_size: int,
        expand: Expand,
        greedy: Greedy,
        recorder: Recorder,
        num_dp: int = 1,
        comm: Rehearsing | None = None,
    ) -> None:
        self._sizes, self._model, self._table, self._caches = sizes, model, table, caches
        self._page_size, self._recorder, self._num_dp = page_size, recorder, num_dp
        self._expand, self._greedy = expand, greedy
        self._recorded: dict[Size, Recorded] = {}
        self._comm = comm or Rehearsing(Alone())

    def size_of(self, step: Step) -> Size | None:
        """The recorded size that a step runs at; None: it runs as it is."""
        size = padded(step, self._sizes)
        return size if size in self._recorded else None

    @property
    def acts(self) -> Mapping[str, Callable[[Size], None]]:
        """See `recording.py`."""
        return {"rehearse": self.rehearse, "meet": self.meet, "record": self.record, "drop": self.drop}

    def rehearse(self, size: Size) -> None:
        """Runs a size on padding, without the other ranks: whatever it raises leaves nobody waiting."""
        with self._comm.alone():
            self._recorder.warm(self._staged(size)[1])

    def meet(self, size: Size) -> None:
        """Runs a size that was rehearsed with the other ranks, whose collectives have kernels and handles too."""
        self._recorder.warm(self._staged(size)[1])

    def record(self, size: Size) -> None:
        """Records a size that has run; steps that are launched from now on run so. On a device nobody waits meanwhile,
        so neither does anybody when it fails."""
        packed, stage = self._staged(size)
        try:
            (tokens, logits), run = self._recorder.capture(stage)
        except torch.OutOfMemoryError:
            self._comm.forget()
            raise
        self._recorded[size] = Recorded(packed, tokens, logits, run)

    def drop(self, size: Size) -> None:
        """Steps of a size that other ranks could not record run as they are."""
        self._recorded.pop(size, None)

    def run(self, size: Size, columns: NDArray[np.int32]) -> Recorded:
        """Runs a step of packed `columns`; its tokens are in the row table too."""
        recorded = self._recorded[size]
        recorded.columns.copy_(staged(columns, recorded.columns.device), non_blocking=True)
        recorded.run()
        return recorded

    def _staged(self, size: Size) -> tuple[Tensor, Callable[[], Results]]:
        """Columns of padding, and what computes them."""
        padding = Part(NO_INTS, NO_INTS, NO_INTS, NO_INTS, np.zeros(0, np.bool_))
        columns = columns_of((padding,) * size.num_halves, size, NO_INTS, self._table.scratch)
        packed = torch.from_numpy(columns).to(self._table.tokens.device)
        return packed, lambda: self._stage(packed, size)

    def _stage(self, packed: Tensor, size: Size) -> Results:
        """What is recorded: ([S] likeliest tokens, [S, G, W] logits)."""
        table = self._table
        halves = [Columns.split(half, size.num_segments) for half in packed.chunk(size.num_halves)]
        hidden = self._model.forward(tuple(self._input(columns, size) for columns in halves), self._caches)
        if not size.one_each:
            last = [(c.cu_lengths[1:] - 1).clamp(min=0) + size.num_tokens * i for i, c in enumerate(halves)]
            hidden = hidden[torch.cat(last) if len(last) > 1 else last[0]]
        logits = self._model.narrow_logits(hidden, (size.num_segments * size.num_halves,) * self._num_dp)
        tokens = self._greedy(logits, self._model.vocab_size)
        for columns, drawn in zip(halves, tokens.to(torch.int32).chunk(size.num_halves), strict=True):
            table.tokens[columns.draw_rows, columns.starts + columns.lengths] = drawn
        return tokens, logits

    def _input(self, columns: Columns, size: Size) -> Input:
        """What the layers get of ranges."""
        table = self._table
        assert table.pages_on_device is not None, "graphs read page tables on the device"
        found = self._expand(columns, size.num_tokens, table.tokens, table.pages_on_device, self._page_size)
        segments = Segments(
            columns.cu_lengths,
            columns.starts,
            columns.lengths,
            columns.slots,
            found.page_table,
            found.positions,
            found.rows,
            found.write_page,
            found.write_offset,
            self._page_size,
            NO_INTS,
            NO_INTS,
            max_length=1 if size.one_each else size.num_tokens,
        )
        return Input(found.tokens, segments, (size.num_tokens,) * self._num_dp)
