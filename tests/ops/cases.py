"""Random steps over scrambled, poisoned pools. Shared by the tests of ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tessera.ops.moe import experts_reference
from tessera.ops.segments import Segments, make_segments

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MIXED = [(0, 200), (33, 64), (7, 5), (0, 1), (129, 1), (15, 1), (16, 1)]
"""(start, length) of ranges: chunks that begin at 0 and in mid page, and decodes on both sides of page borders."""
DECODES = [(n, 1) for n in (0, 1, 15, 16, 17, 63, 64, 100, 101, 102, 500)]
VERIFY = [(n, 4) for n in (0, 3, 61, 62, 200)]
RANGES = {"mixed": MIXED, "decodes": DECODES, "verify": VERIFY, "one": [(41, 1)], "long": [(700, 1100), (0, 300)]}
BATCHES = {
    "decode": [(n, 1) for n in (0, 1, 63, 64, 1000, 1023, 4095, 9000)] * 4,
    "verify": [(n, 4) for n in (0, 62, 1000, 3000)] + [(500, 8), (77, 2)],
    "chunks": [(0, 1000), (700, 513), (0, 9), (2048, 64)],
    "mixed": [(0, 700), (900, 130), (12, 5), (1024, 1), (3, 1), (0, 1)],
}
"""For kernels on a device."""


@dataclass(frozen=True)
class Case:
    """Segments whose pages and slots are scattered over pools; `unused` pages and slots are nobody's."""

    segments: Segments
    num_pages: int
    num_slots: int
    unused_pages: Tensor
    unused_slots: Tensor


def case(ranges: list[tuple[int, int]], page_size: int, seed: int = 0, device: str = "cpu") -> Case:
    """Scatters the ranges' pages and slots over pools that are a third larger than needed."""
    rng = np.random.default_rng(seed)
    needed = [-(-(start + length) // page_size) for start, length in ranges]
    num_pages, num_slots = sum(needed) * 4 // 3 + 2, len(ranges) * 4 // 3 + 2
    pages = rng.permutation(np.arange(1, num_pages))
    slots = rng.permutation(np.arange(1, num_slots))
    tables, at = np.zeros((len(ranges), max(needed) + 1), np.int32), 0  # what lies past a range's pages is page 0
    for row, count in enumerate(needed):
        tables[row, :count] = pages[at : at + count]
        at += count
    starts, lengths = np.array(ranges, np.int32).T
    segments = make_segments(starts, lengths, tables, slots[: len(ranges)], page_size, device)
    unused_pages = torch.from_numpy(np.append(pages[at:], 0))
    return Case(segments, num_pages, num_slots, unused_pages, torch.from_numpy(np.append(slots[len(ranges) :], 0)))


def paged(case: Case, *middle: int, tokens: Tensor) -> Tensor:
    """A pool [page, *middle, token, dim] with `tokens[s]` [L, *middle, dim] in the pages of segment s, else NaN."""
    size, like = case.segments.page_size, tokens[0]
    shape = (case.num_pages, *middle, size, like.shape[-1])
    pool = torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)
    by_token = pool.movedim(-2, 1)
    for s, values in enumerate(tokens):
        at = torch.arange(len(values), device=like.device)
        by_token[case.segments.page_table[s, at // size], at % size] = values
    return pool


def for_a_graph(segments: Segments, pages: int, padding: int = 0, longest: int | None = None) -> Segments:
    """The segments as a graph sees them: padded, tables `pages` wide, and nothing of the batch known on the host.

    `padding` ranges of one token on page 0 follow, then an empty one and two tokens of no range. What lies behind a
    sequence's pages is garbage. `longest`: the bound of a range's length.
    """
    lengths = np.append(segments.host_lengths, np.ones(padding, np.int32))
    starts = np.append(segments.host_starts, np.zeros(padding, np.int32))
    tables = np.full((len(lengths) + 1, pages), 2**30, np.int32)
    own = segments.page_table.cpu().numpy()
    for row, end in enumerate((segments.host_starts + segments.host_lengths).tolist()):
        needed = -(-end // segments.page_size)
        tables[row, :needed] = own[row, :needed]
    tables[len(own) :, :1] = 0
    slots = np.append(segments.slots.cpu().numpy(), np.zeros(padding, np.int32))
    made = make_segments(starts, lengths, tables[:-1], slots, segments.page_size, segments.device)
    columns = {name: torch.nn.functional.pad(getattr(made, name), (0, 1)) for name in ("starts", "lengths", "slots")}
    tokens = ("positions", "rows", "write_page", "write_offset")
    columns |= {name: torch.nn.functional.pad(getattr(made, name), (0, 2)) for name in tokens}
    columns["cu_lengths"] = torch.cat((made.cu_lengths, made.cu_lengths[-1:]))
    columns["page_table"] = torch.from_numpy(tables).to(segments.device)
    none = np.zeros(0, np.int32)
    bound = longest or made.max_length
    return replace(made, **columns, max_length=bound, host_starts=none, host_lengths=none, _made={})


def ends(case: Case) -> list[int]:
    """Length of each sequence after the step."""
    return (case.segments.host_starts + case.segments.host_lengths).tolist()


CHOICES = ["any", "some held", "one expert", "none held"]


def expert_ids(choice: str, num_tokens: int, num_experts: int, top_k: int, device: str) -> Tensor:
    """[T, k], one of `CHOICES`. The last expert is never chosen."""
    if choice == "one expert":
        return torch.full((num_tokens, top_k), 1, device=device)
    ids = torch.rand(num_tokens, num_experts - 1, device=device).topk(top_k, -1).indices
    if choice == "some held":
        ids[ids % 2 == 0] = -1
    return torch.full_like(ids, -1) if choice == "none held" else ids


def expert_weights(num: int, hidden: int, inner: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Of so many experts: gate | up, and down."""
    w13 = torch.randn(num, 2 * inner, hidden, device=device) * hidden**-0.5
    return w13.to(dtype), (torch.randn(num, hidden, inner, device=device) * inner**-0.5).to(dtype)


def experts_one_by_one(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`experts_reference` in the dtype of x, so that the widened weights stay small."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e >= 0:
            own = w13[e : e + 1].to(x.dtype), w2[e : e + 1].to(x.dtype), torch.where(ids == e, 0, -1)
            out += experts_reference(x, *own, weights.to(x.dtype))
    return out


def check_experts(
    form: Callable[..., Tensor], num_tokens: int, num: int, hidden: int, inner: int, top_k: int, dtype: torch.dtype,
    choice: str = "any", device: str = "cpu", loss: float = 1,
) -> None:  # fmt: skip
    """`form` gives what the plain twin does, whatever an expert that nobody chose holds. `loss`: see `assert_close`."""
    x = torch.randn(num_tokens, hidden + 8, device=device).to(dtype)[:, :hidden]  # rows with gaps between them
    w13, w2 = expert_weights(num, hidden, inner, dtype, device)
    w13[-1], w2[-1] = float("nan"), float("nan")
    ids = expert_ids(choice, num_tokens, num, top_k, device)
    weights = torch.rand(num_tokens, top_k, device=device)
    found = form(x, w13, w2, ids, weights)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    wide = torch.float32 if device == "cuda" else torch.float64
    assert_close(found, experts_one_by_one(x.to(wide), w13, w2, ids, weights), loss=loss)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype | None = None, loss: float = 1) -> None:
    """Equal within the tolerance of `dtype`, relative to the largest magnitude expected. NaN never is. `loss`: as many
    times the tolerance."""
    dtype = dtype or found.dtype
    limit = loss * TOLERANCE[dtype] * max(1e-6, expected.double().abs().max().item())
    difference = (found.double() - expected.double()).abs().max().item()
    assert difference <= limit, f"{difference:.3g} apart, allowed {limit:.3g} in {dtype}"


def stored_narrow(x: Tensor) -> Tensor:
    """fp32 as a kernel stores it in bfloat16; Triton's interpreter, on a CPU, cuts off what a device rounds."""
    return x.bfloat16() if x.is_cuda else (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
