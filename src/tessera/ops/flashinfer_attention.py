"""Attention by FlashInfer's kernels (arXiv 2501.01005), behind the entries of `attention.py` and `mla.py`.

Our pools are what it reads: `[page, 2, H, token, D]` is its HND layout, and of MLA's pages it takes two strided views.
A step is planned on the host, once for all layers (`flashinfer_plans.py`). A step that is, or later will be, recorded
in a CUDA graph, and whatever FlashInfer has no kernel for, runs on `rest`. Long ranges come first in a step: what is
before the last of them is one launch of the Hopper form, the rest one of the form that cuts keys into splits and packs
the query heads of a key head.

T tokens, S segments, H heads, D head dim, R latent rank, Dr rope dim, N nope dim, V value dim, L expanded positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.core.config.needs import Sketch
from tessera.core.spec import AttentionSpec, MLASpec, ModelSpec
from tessera.ops.backend import Backend
from tessera.ops.flashinfer_plans import Done, Planned, Ranges, Turns, begins, ranges_of
from tessera.ops.segments import Segments
from tessera.ops.upload import staged, upload

SHORT = 8  # tokens of a range up to which keys are cut into splits: as in our own kernels
WORKSPACE = 128 << 20  # bytes for partial results, shared by all launches: they run one after the other
LATENT = (512, 64)  # R and Dr that there are MLA kernels for
EXPANDED = (192, 128)  # N + Dr and V that there are Hopper kernels for where they differ
WRAPPER = (8 << 20) + (128 << 10)  # bytes that a wrapper keeps for plans
TURNS = 3  # wrappers of one kind: of the steps that are under way, and of the one that is planned
MOST_BYTES = 1 << 30  # of gathered latents with their keys and values; past that, `rest` expands the step's own


def workspace_bytes(sketch: Sketch) -> int:
    """Bytes of the workspace and of the wrappers: of each mixer's kernels two kinds, which take turns."""
    if sketch.kernels.attention != "flashinfer":
        return 0
    mixers = {layer.mixer for layer in sketch.spec.layers if isinstance(layer.mixer, AttentionSpec | MLASpec)}
    return WORKSPACE + 2 * len({type(mixer) for mixer in mixers}) * TURNS * WRAPPER


@dataclass(frozen=True, slots=True)
class Expanded:
    """All positions of all sequences, L of them: `pages` and `offsets` [L] on the device, and where those of each
    sequence begin [S + 1] on the host."""

    pages: Tensor
    offsets: Tensor
    keys: Tensor


class FlashInfer:
    """`library`: the module flashinfer. `hopper`: its kernels for compute capability 9.0 can run. `mark`: see `Turns`.

    Ranges of up to `recorded` tokens together are for `rest`.
    """

    def __init__(self, library: Any, rest: Backend, hopper: bool, mark: Callable[[], Done], recorded: int = 0) -> None:
        self._library, self._rest, self._mark, self._recorded = library, rest, mark, recorded
        self._fast = "fa3" if hopper else "fa2"
        self._workspace: Tensor | None = None
        self._turns: dict[tuple[str, str], Turns[Any]] = {}

    def compile(self, spec: ModelSpec, dtype: torch.dtype, kv: torch.dtype) -> None:
        """Builds what the layers of a model will launch, all at once: minutes the first time, then from its cache."""
        modules: dict[str, Any] = {}
        for mixer in dict.fromkeys(layer.mixer for layer in spec.layers):
            for module in self._modules(mixer, dtype, kv):
                modules[module.name] = module
        self._library.jit.build_jit_specs(list(modules.values()))

    def _modules(self, mixer: object, dtype: torch.dtype, kv: torch.dtype) -> Iterator[Any]:
        jit, types = self._library.jit, (dtype, kv, dtype, torch.int32)
        plain = (0, False, False, False)  # no rope, no window, no cap of logits, sums in float32
        if isinstance(mixer, AttentionSpec):
            for form in {"fa2", self._form(dtype, kv)}:
                yield jit.gen_batch_prefill_module(form, *types, mixer.head_dim, mixer.head_dim, *plain)
        if isinstance(mixer, MLASpec) and (mixer.latent_dim, mixer.rope.dim) == LATENT:
            yield jit.gen_batch_mla_module(self._fast, *types, *LATENT, False)
            if (mixer.query_dim, mixer.value_dim) == EXPANDED:
                own = (dtype, dtype, dtype, torch.int32)
                yield jit.gen_batch_prefill_module(self._fast, *own, *EXPANDED, *plain)

    def _form(self, q: torch.dtype, kv: torch.dtype) -> str:
        """The form of long ranges: Hopper's wants keys in the dtype of the queries."""
        return self._fast if q == kv else "fa2"

    def paged_attention(self, q: Tensor, pool: Tensor, segments: Segments, scale: float) -> Tensor:
        """See `paged_attention_reference`; q in bf16 or fp16."""
        if not self._serves(segments):
            return self._rest.paged_attention(q, pool, segments, scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for first, last, form in self._runs(segments, self._form(q.dtype, pool.dtype)):
            part, tokens = segments.part(first, last), segments.tokens_of(first, last)
            key = (form, q.shape[1:], pool.shape[2], scale, q.dtype, pool.dtype)
            planned = part.once(("flashinfer", *key), partial(self._paged, form, q, pool, part, scale))
            planned.wrapper.run(q[tokens], pool, out=out[tokens])
        return out

    def _serves(self, segments: Segments) -> bool:
        """The host knows the lengths, and no graph will ever hold such a step."""
        return segments.known and segments.num_tokens > self._recorded

    @staticmethod
    def _runs(segments: Segments, form: str) -> list[tuple[int, int, str]]:
        """(first, last, form) of neighbouring segments: one run where long ranges have no form of their own."""
        long, last = np.flatnonzero(segments.host_lengths > SHORT), segments.num_segments
        cut = int(long[-1]) + 1 if len(long) and form != "fa2" else 0
        return [run for run in ((0, cut, form), (cut, last, "fa2")) if run[0] < run[1]]

    def _paged(self, form: str, q: Tensor, pool: Tensor, part: Segments, scale: float) -> Planned[Any]:
        r, dim = ranges_of(part), q.shape[2]

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                r.queries, r.pages, r.indices, r.last, q.shape[1], pool.shape[2], dim, part.page_size, causal=True,
                sm_scale=scale, q_data_type=q.dtype, kv_data_type=pool.dtype, seq_lens=r.keys,
                max_token_per_sequence=part.max_length,
            )  # fmt: skip

        return self._turn("BatchPrefillWithPagedKVCacheWrapper", form, q.device, "HND").take(plan)

    def mla_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
    ) -> Tensor:
        """See `mla_absorbed_reference`; in bf16 or fp16. One launch for ranges of any length."""
        (heads, width, rank), nope, dim = kv_b.shape, q_nope.shape[2], q_rope.shape[2]
        if not self._serves(segments) or (rank, dim) != LATENT or pool.dtype != q_nope.dtype:
            return self._rest.mla_absorbed(q_nope, q_rope, kv_b, pool, segments, scale)
        w_k, w_v = kv_b.split((nope, width - nope), 1)
        q = torch.einsum("thn,hnr->thr", q_nope, w_k).contiguous()
        planned = segments.once(("flashinfer", "mla", heads, scale, q.dtype), partial(self._latent, q, segments, scale))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        planned.wrapper.run(q, q_rope, pool[..., :rank], pool[..., rank:], out=out)
        return torch.einsum("thr,hvr->thv", out, w_v)

    def _latent(self, q: Tensor, segments: Segments, scale: float) -> Planned[Any]:
        r: Ranges = ranges_of(segments)

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                r.queries, r.pages, r.indices, r.keys, q.shape[1], *LATENT, segments.page_size, True, scale,
                q.dtype, q.dtype,
            )  # fmt: skip

        return self._turn("BatchMLAPagedAttentionWrapper", self._fast, q.device).take(plan)

    def mla_expanded(
        self, q_nope: Tensor, q_rope: Tensor, kv_b: Tensor, pool: Tensor, segments: Segments, scale: float
    ) -> Tensor:
        """See `mla_expanded_reference`; in bf16 or fp16. All positions become keys and values, heads side by side."""
        (heads, width, rank), nope, dim = kv_b.shape, q_nope.shape[2], q_rope.shape[2]
        ends = segments.host_starts + segments.host_lengths
        entry = rank + dim + heads * (width + nope + dim)
        fits = int(ends.sum()) * entry * q_nope.element_size() <= MOST_BYTES
        if not self._serves(segments) or (nope + dim, width - nope) != EXPANDED or not fits:
            return self._rest.mla_expanded(q_nope, q_rope, kv_b, pool, segments, scale)
        rows = segments.once("flashinfer expanded", partial(_expanded, segments))
        cached = pool[rows.pages, rows.offsets].to(q_nope.dtype)
        expanded = torch.nn.functional.linear(cached[:, :rank], kv_b.flatten(0, 1)).view(-1, heads, width)
        k = expanded.new_empty(len(cached), heads, nope + dim)
        k[..., :nope], k[..., nope:] = expanded[..., :nope], cached[:, None, rank:]
        key = ("flashinfer", "expanded", heads, scale, q_nope.dtype)
        planned = segments.once(key, partial(self._ragged, rows, heads, q_nope, segments, scale))
        out = torch.empty(len(q_nope), heads, width - nope, dtype=q_nope.dtype, device=q_nope.device)
        planned.wrapper.run(torch.cat((q_nope, q_rope), -1), k, expanded[..., nope:], out=out)
        return out

    def _ragged(self, rows: Expanded, heads: int, q: Tensor, segments: Segments, scale: float) -> Planned[Any]:
        r = ranges_of(segments)

        def plan(wrapper: Any) -> None:
            wrapper.plan(
                r.queries, rows.keys, heads, heads, *EXPANDED, causal=True, sm_scale=scale, q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )  # fmt: skip

        return self._turn("BatchPrefillWithRaggedKVCacheWrapper", self._fast, q.device, "NHD").take(plan)

    def _turn(self, kind: str, form: str, device: torch.device, *layout: str) -> Turns[Any]:
        if self._workspace is None:
            self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        if (kind, form) not in self._turns:
            make = partial(getattr(self._library, kind), self._workspace, *layout, backend=form)
            self._turns[kind, form] = Turns(make, self._mark)
        return self._turns[kind, form]


def _expanded(segments: Segments) -> Expanded:
    ends = segments.host_starts + segments.host_lengths
    keys = begins(ends)
    row = np.repeat(np.arange(len(ends)), ends)
    position = np.arange(len(row)) - np.repeat(keys[:-1], ends)
    row, position = upload(np.stack((row, position)), segments.device)
    pages = segments.page_table[row, position // segments.page_size]
    return Expanded(pages, position % segments.page_size, staged(keys, segments.device))
