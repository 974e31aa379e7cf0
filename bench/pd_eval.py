"""The four-choice evaluation through a hand-over between unequal layouts: `python bench/pd_eval.py`.

Prefill with attention TP 4, decode with attention TP 2, against one rank; then the same with three faults that others
have shipped, put into the plan of copies. Everything runs in this process, ranks as threads. Writes
`bench/results/pd_eval.md`; the exit code is 1 where the hand-over is outside of the single rank's spread, or where a
fault does not cost ten points.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from commit import commit
from tessera.client import Ask, Piece
from tessera.core.layout import Layout, Section
from tessera.core.mesh import Mesh
from tessera.core.reshard import Copy, Span
from tessera.evals.run import Plan, Result, evaluate
from tessera.evals.tasks import TASKS, Task
from tessera.serve.engine import Engine
from tessera.transfer import copies

RESULTS = Path(__file__).resolve().parent / "results" / "pd_eval.md"
MODEL = "abacus-hybrid"
FLAGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "collectives": "threads", "max_running_requests": 64}
PREFILL: dict[str, Any] = {"tp": 4, "disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 0}
DECODE: dict[str, Any] = {"tp": 4, "dp": 2, "ep": 2, "enable_dp_attention": True, "enable_dp_lm_head": True,
                          "moe_dense_tp_size": 1, "disaggregation_mode": "decode"}  # fmt: skip
POINTS = 0.10  # what a fault must cost
PAGE = """# Seed 2's evidence: four-choice questions through a hand-over between unequal layouts

{model}, {num} held-out questions, temperature {temperature}, fixed seeds, float32 on CPU. *hand-over*: prefill with
attention TP 4, decode with TP 4, DP 2, EP 2, dp-lm-head, dense TP 1 (attention TP 2), as in the seed's recipe. The
three faults are put into the plan of copies. *alike*: answers that are the single rank's, to the character.
Written by `python bench/pd_eval.py` at commit {commit} on
{machine}, {date}.

| run | repeat | mean | scores | alike |
|---|---|---|---|---|
{rows}
"""
Reshard = Callable[[Layout, Mesh, Layout, Mesh, int], list[Copy]]


class One:
    """One engine as a client."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """The answer, in one piece."""
        yield await self._ask(self.engine, ask, {})

    async def _ask(self, engine: Engine, ask: Ask, fields: dict[str, Any]) -> Piece:
        assert ask.messages is not None
        tokens = await asyncio.to_thread(engine.conversation, ask.messages)
        params = {"temperature": ask.temperature, "max_new_tokens": ask.max_tokens, "sampling_seed": ask.seed}
        body = await engine.async_generate(None, {k: v for k, v in params.items() if v is not None}, tokens, **fields)
        meta = body["meta_info"]
        return Piece(body["text"], meta["completion_tokens"], meta["prompt_tokens"], meta["finish_reason"]["type"])

    async def vocab_size(self) -> int | None:
        """Not asked."""
        return None

    async def close(self) -> None:
        """Whoever made the engine ends it."""


class Two(One):
    """A prefill and a decode engine as a client: every request goes to both."""

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        super().__init__(decode)
        self.prefill = prefill
        host, _, port = str(prefill.info["bootstrap"]).rpartition(":")
        self._place = {"bootstrap_host": host, "bootstrap_port": int(port)}
        self._rooms = 0

    async def stream(self, ask: Ask) -> AsyncGenerator[Piece]:
        """Decode's answer, in one piece."""
        self._rooms += 1
        fields = {**self._place, "bootstrap_room": self._rooms}
        _, piece = await asyncio.gather(self._ask(self.prefill, ask, fields), self._ask(self.engine, ask, fields))
        yield piece


def local_rank_as_the_offset(right: Reshard) -> Reshard:
    """Seed 2's fault: of a state, writer r fills part r and not r mod W of its reader's slot."""

    def wrong(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int) -> list[Copy]:
        found = right(src, src_mesh, dst, dst_mesh, turn)
        if src.dims[0].axis != "attn":  # pages
            return found
        moved = [(c, replace(c.box[0], dst=c.src * c.box[0].length)) for c in found]
        return [Copy(c.src, c.dst, (first, *c.box[1:])) for c, first in moved]

    return wrong


def conv_state_as_one_block(right: Reshard) -> Reshard:
    """A window q | k | v is taken for one block that is cut evenly: rank r has rows r * n to r * n + n of it, on either
    side. Nothing is written beyond a reader's window, and nothing of it is left out."""

    def wrong(src: Layout, src_mesh: Mesh, dst: Layout, dst_mesh: Mesh, turn: int) -> list[Copy]:
        if src.dims[0].name != "channels":
            return right(src, src_mesh, dst, dst_mesh, turn)
        (has, *rest), (wants, *_) = src.local_shape(src_mesh, 0), dst.local_shape(dst_mesh, 0)
        whole = tuple(Span(0, 0, length) for length in rest)
        found = []
        for writer, reader in product(range(src_mesh.size), range(dst_mesh.size)):
            begin, end = max(writer * has, reader * wants), min((writer + 1) * has, (reader + 1) * wants)
            if begin < end:
                rows = Span(begin - writer * has, begin - reader * wants, end - begin)
                found.append(Copy(writer, reader, (rows, *whole)))
        return found

    return wrong


def heads_by_modulo(right: Reshard) -> Reshard:
    """A KV head with several holders is taken for that of rank % heads, not rank // holders."""
    held = Section.held

    def modulo(self: Section, size: int, rank: int) -> Any:
        return (rank % self.units,) if size > self.units else held(self, size, rank)

    def wrong(*layouts: Any) -> list[Copy]:
        with mock.patch.object(Section, "held", modulo):
            return right(*layouts)

    return wrong


FAULTS = (local_rank_as_the_offset, conv_state_as_one_block, heads_by_modulo)


@contextlib.contextmanager
def planned(fault: Callable[[Reshard], Reshard] | None) -> Iterator[None]:
    """Plans of copies with a fault."""
    copies._moves.cache_clear()
    with mock.patch.object(copies, "reshard", copies.reshard if fault is None else fault(copies.reshard)):
        yield
    copies._moves.cache_clear()


def run(client: One, task: Task, num: int, plan: Plan, name: str) -> Result:
    """One evaluation."""
    began = time.monotonic()
    result = asyncio.run(evaluate(client, task, task.questions("heldout", num), plan))
    sys.stderr.write(f"{name}: mean {result.score:.3f}, {time.monotonic() - began:.0f} s\n")
    return result


def handed_over(fault: Callable[[Reshard], Reshard] | None, task: Task, num: int, plan: Plan, name: str) -> Result:
    """The evaluation through a pair of engines."""
    with planned(fault), Engine(MODEL, **FLAGS, **PREFILL) as prefill, Engine(MODEL, **FLAGS, **DECODE) as decode:
        return run(Two(prefill, decode), task, num, plan, name)


def row(name: str, result: Result, single: Result) -> str:
    """As Markdown."""
    alike = sum(a.text == b.text for a, b in zip(result.answers, single.answers, strict=False)) / len(result.answers)
    scores = ", ".join(f"{score:.3f}" for score in result.scores)
    return f"| {name} | {len(result.scores)} | {result.score:.3f} | {scores} | {alike:.4f} |"


def main() -> int:
    """Runs all, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="gpqa")
    parser.add_argument("--num-questions", type=int, default=198)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--fault-repeat", type=int, default=None, help="Default: as --repeat.")
    parser.add_argument("--parallel", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    plan = Plan(options.parallel, options.repeat, temperature=options.temperature)
    few = replace(plan, repeat=options.fault_repeat or options.repeat)
    task, num = TASKS[options.task], options.num_questions
    with Engine(MODEL, **FLAGS) as engine:
        single = run(One(engine), task, num, plan, "one rank")
    right = handed_over(None, task, num, plan, "hand-over")
    wrong = {fault.__name__: handed_over(fault, task, num, few, fault.__name__) for fault in FAULTS}
    rows = [row("one rank", single, single), row("hand-over", right, single)]
    rows += [row(f"fault: {name.replace('_', ' ')}", result, single) for name, result in wrong.items()]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch on CPU"
    told = {
        "model": MODEL,
        "num": num,
        "temperature": plan.temperature,
        "machine": machine,
        "date": time.strftime("%F"),
        "commit": commit(),
    }
    options.output.write_text(PAGE.format(rows="\n".join(rows), **told))
    sys.stdout.write(options.output.read_text())
    inside = min(single.scores) <= right.score <= max(single.scores)
    return 0 if inside and all(result.score <= single.score - POINTS for result in wrong.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
