"""A case is served, and judged: its answers are those of one rank that is asked for each alone."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from matrix.answers import apart, begun, cached, plain
from matrix.drawn import CONTEXT, VOCAB, Case
from matrix.serving import GQA
from matrix.whole import Call, Flags, deployed
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.weights import weight_table
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tiny import HYBRID, MLA, TinyModel

EXACT: Flags = {"dtype": "float64", "context_length": CONTEXT}
PLAIN: Flags = {
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "max_total_tokens": 2048,
    "page_size": 16,
    "max_running_requests": 16,
}
NEVER = 1 << 30  # messages: a call waits until nothing else is open


@cache
def model_of(name: str) -> TinyModel:
    """A tiny model that knows the byte tokenizer's ids, and four more."""
    config = {"gqa": GQA, "hybrid": HYBRID, "mla": MLA}[name]
    spec = read_spec({**config, "vocab_size": VOCAB})
    return TinyModel(spec, Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 3))


def alone(case: Case) -> list[Any]:
    """What one rank answers that is asked for each whole answer alone, one after the other."""
    asked = []
    for call in case.calls:
        body = {name: value for name, value in call.body.items() if name not in ("stream", "stream_options")}
        asked.append(Call(call.path, body, at=NEVER))
    found = asyncio.run(deployed(model_of(case.model), [{**EXACT, **PLAIN, **case.both}], asked))
    return [plain(answer) for answer in found]


def wrong(case: Case, expected: list[Any] | None = None) -> list[str]:
    """What differs from one rank's answers, which are `expected`, if they are known."""
    servers = [{**EXACT, **case.both, **server} for server in case.servers]
    answers = asyncio.run(deployed(model_of(case.model), servers, case.calls))
    differ = []
    for i, (call, found, wanted) in enumerate(zip(case.calls, answers, expected or alone(case), strict=True)):
        if found.cut:  # of choices that have ended early others may be the best
            differ += [] if "best_of" in call.body else begun(found, wanted, f"call {i}")
            continue
        differ += list(apart(plain(found), wanted, f"call {i}"))
        for few, many in cached(found.bodies):
            if not 0 <= few < many or (few and all(s.get("disable_radix_cache") for s in servers)):
                differ.append(f"call {i}: {few} of {many} tokens cached")
    return differ
