"""FlashInfer's wrappers by their documentation, on CPU: they keep the contract of `plan` and `run`, and no kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [n, H, D], the last n positions, over k [L, H, D] and v [L, H, V] in float64."""
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k.double()) * scale
    at = torch.arange(len(k))
    hidden = at > (at[len(k) - len(q) :, None] if len(q) else at[:0, None])
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v.double()).to(v.dtype)


class Wrapper:
    """What the three have in common: `plans` made, and the ranges of the last."""

    def __init__(self, workspace: Tensor, *layout: str, backend: str) -> None:
        assert backend in ("fa2", "fa3"), backend
        self.workspace, self.layout, self.backend, self.plans = workspace, layout, backend, 0

    def _keep(self, *arrays: Tensor) -> None:
        self.plans += 1
        for array in arrays:
            assert array.dtype == torch.int32, "FlashInfer's indices are int32"
        self.kept = [array.clone() for array in arrays]

    def _each(self) -> Any:
        """(slice of tokens, pages, tokens of the sequence) of each range."""
        queries, pages, indices, keys = self.kept
        for s in range(len(keys)):
            first, last = int(queries[s]), int(queries[s + 1])
            yield slice(first, last), indices[int(pages[s]) : int(pages[s + 1])].long(), int(keys[s])


class Paged(Wrapper):
    """BatchPrefillWithPagedKVCacheWrapper."""

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, sm_scale: float,
        q_data_type: torch.dtype, kv_data_type: torch.dtype, seq_lens: Tensor, max_token_per_sequence: int,
    ) -> None:  # fmt: skip
        assert causal
        counts = paged_kv_indptr.diff()
        assert torch.equal((counts - 1) * page_size + paged_kv_last_page_len, seq_lens)
        assert max_token_per_sequence == qo_indptr.diff().max()
        self._keep(qo_indptr, paged_kv_indptr, paged_kv_indices, seq_lens)
        self.scale, self.heads, self.dtypes = sm_scale, (num_qo_heads, num_kv_heads, head_dim_qk), q_data_type

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor) -> None:
        assert self.layout == ("HND",)
        num_q, num_kv, dim = self.heads
        assert (q.shape[1:], paged_kv_cache.shape[2], q.dtype) == ((num_q, dim), num_kv, self.dtypes)
        assert len(q) == self.kept[0][-1]
        for tokens, pages, length in self._each():
            k, v = paged_kv_cache[pages].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
            k, v = (x.repeat_interleave(num_q // num_kv, 1) for x in (k, v))
            out[tokens] = causal(q[tokens], k, v, self.scale)


class Latent(Wrapper):
    """BatchMLAPagedAttentionWrapper."""

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int,
        head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        self._keep(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        self.scale, self.sizes = sm_scale, (num_heads, head_dim_ckv, head_dim_kpe)

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, *, out: Tensor) -> None:
        assert (q_nope.shape[1], ckv_cache.shape[2], kpe_cache.shape[2]) == self.sizes
        for tokens, pages, length in self._each():
            latent, rope = (x[pages].flatten(0, 1)[:length, None].expand(-1, self.sizes[0], -1)
                            for x in (ckv_cache, kpe_cache))  # fmt: skip
            q, k = torch.cat((q_nope[tokens], q_pe[tokens]), -1), torch.cat((latent, rope), -1)
            out[tokens] = causal(q, k, latent, self.scale)


class Ragged(Wrapper):
    """BatchPrefillWithRaggedKVCacheWrapper."""

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        head_dim_vo: int, *, causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        self._keep(qo_indptr, kv_indptr)
        self.scale, self.sizes = sm_scale, (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo)

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> None:
        assert (q.shape[1], k.shape[1], k.shape[2], v.shape[2]) == self.sizes
        queries, keys = (array.tolist() for array in self.kept)
        assert (len(q), len(k), len(v)) == (queries[-1], keys[-1], keys[-1])
        for s in range(len(keys) - 1):
            tokens, own = slice(*queries[s : s + 2]), slice(*keys[s : s + 2])
            out[tokens] = causal(q[tokens], k[own], v[own], self.scale)


class Jit:
    """Keeps what was asked to be built."""

    def __init__(self) -> None:
        self.built: list[str] = []

    def gen_batch_prefill_module(self, *args: Any) -> Any:
        return SimpleNamespace(name=f"prefill {args}")

    def gen_batch_mla_module(self, *args: Any) -> Any:
        return SimpleNamespace(name=f"mla {args}")

    def build_jit_specs(self, specs: list[Any]) -> None:
        self.built += [spec.name for spec in specs]


def library() -> Any:
    """The module, as far as we use it."""
    return SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=Paged,
        BatchMLAPagedAttentionWrapper=Latent,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
        jit=Jit(),
    )
