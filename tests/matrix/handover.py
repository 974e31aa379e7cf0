"""`make matrix-pd ARGS="--minutes 60"`: each pair of layouts of prefill and decode answers as one rank.

Layouts are (attention TP, DP) of 1, 2, 4 each. One prefill server meets decode servers in turn. Each pair is a line of
`runs/matrix-pd.jsonl`; what passed at this commit is not run again. Exit code 1 when one has failed, or its requests
ran out of time ("late").
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch

from matrix.results import ROOT, Results, commit, counted
from run.pd import Server
from tessera.core.messages import SamplingParams, Submit
from test_trained import trained
from tiny import TinyModel, serve, tiny_model

Layout = tuple[int, int]
SIZES = (1, 2, 4)
LAYOUTS: tuple[Layout, ...] = tuple((attn, dp) for dp in SIZES for attn in SIZES)
NUM = 64
WAIT_S = 600.0
TRAINED = ("abacus-hybrid", "abacus-mla")
MODELS = (*TRAINED, "qwen3", "hybrid", "mla")  # what issue 4 is judged by goes first
WAY = "threads"


@dataclass(frozen=True)
class Pair:
    """A model, and two layouts."""

    model: str
    prefill: Layout
    decode: Layout

    def __str__(self) -> str:
        return f"{self.model}: prefill {shown(self.prefill)}, decode {shown(self.decode)}"


def shown(layout: Layout) -> str:
    """For people."""
    return f"TP {layout[0]} DP {layout[1]}"


def flags(attn: int, dp: int) -> dict[str, Any]:
    """Those of a layout."""
    return {"tp": attn * dp, "dp": dp, "enable_dp_attention": True} if dp > 1 else {"tp": attn}


def stages() -> list[tuple[str, list[Pair]]]:
    """What counts most goes first: a name, and pairs by model and prefill."""
    found = []
    for what, most in (("DP 1 and 2", 2), ("DP 4 on a side", 4)):
        for model in MODELS:
            both = [Pair(model, p, d) for p in LAYOUTS for d in LAYOUTS if in_stage(max(p[1], d[1]), most)]
            found.append((f"{model}, {what}", both))
    return found


def in_stage(dp: int, most: int) -> bool:
    """The stage of DP 4 has it on at least one side."""
    return dp == most if most > 2 else dp <= most


@cache
def model_of(name: str) -> tuple[TinyModel, dict[str, Any]]:
    """A model, and the flags under which answers must be equal."""
    if name in TRAINED:
        return trained(name), {"dtype": "float32", "page_size": 16, "max_total_tokens": 8192}
    return tiny_model(name), {"dtype": "float64"}


@cache
def expected(name: str) -> tuple[dict[str, Any], list[Submit], dict[tuple[str, int], list[int]]]:
    """Flags of both servers, what they are asked, and what one rank answers."""
    model, exact = model_of(name)
    both = {**exact, "chunked_prefill_size": 32, "watchdog_timeout": 120.0}
    asked = prompts(model.spec.vocab_size)
    return both, asked, serve(model, asked, **both).tokens()


def prompts(vocab_size: int) -> list[Submit]:
    """Greedy, from one token to several chunks of 32."""
    made = []
    for i in range(NUM):
        tokens = [2 + (i * 13 + k * (1 + i % 5)) % (vocab_size - 4) for k in range(1 + (i * 7) % 130)]
        made.append(Submit(f"r{i}", tokens, SamplingParams(temperature=0.0, max_new_tokens=4 + i % 5, ignore_eos=True)))
    return made


class Side:
    """A prefill server that decode servers meet in turn; another one after a failure."""

    def __init__(self, model: str, layout: Layout) -> None:
        self._model, self._layout = model, layout
        self._server: Server | None = None
        self._rooms = 0

    def wrong(self, decode: Layout) -> str:
        """What is wrong with a decode server of this layout beside it; "" where nothing is."""
        model, (both, asked, wanted) = model_of(self._model)[0], expected(self._model)
        if self._server is None:
            self._server = Server(model, "prefill", **both, **flags(*self._layout))
        prefix, self._rooms = f"{self._rooms}/", self._rooms + NUM
        server = Server(model, "decode", **both, **flags(*decode))
        try:
            return one(self._server, server, asked, wanted, prefix, self._rooms)
        finally:
            server.close()

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            server, self._server = self._server, None
            server.close()


def one(prefill: Server, decode: Server, asked: list[Submit], wanted: Any, prefix: str, room: int) -> str:
    """What is wrong with a pair."""
    for i, submit in enumerate(asked):
        named = msgspec.structs.replace(submit, request_id=prefix + submit.request_id)
        whole = msgspec.structs.replace(named, bootstrap_room=room + i, bootstrap=prefill.address)
        prefill.post(whole)
        decode.post(whole)
    keys = [(prefix + submit.request_id, 0) for submit in asked]
    for server in (decode, prefill):
        server.ended(keys, WAIT_S)
    for server in (decode, prefill):
        server.free(WAIT_S)
    if decode.errors:
        return f"{len(decode.errors)} errors, as {next(iter(decode.errors.values()))}"
    differ = [s.request_id for s in asked if decode.answers[prefix + s.request_id, 0].tokens != wanted[s.request_id, 0]]
    return f"{len(differ)} answers differ, as {differ[0]}" if differ else ""


def judge(side: Side, decode: Layout) -> tuple[str, str]:
    """What came of a pair, and why; one that breaks has failed, and its prefill server is not used again."""
    try:
        wrong = side.wrong(decode)
        return "failed" if wrong else "passed", wrong
    except Exception as error:
        why = traceback.format_exc()
        try:
            side.close()
        except Exception:
            why += traceback.format_exc()
        return "late" if isinstance(error, TimeoutError) else "failed", why


def work(results: Results, plan: Sequence[tuple[str, list[Pair]]], until: float) -> None:
    """Runs what has not passed yet, until the time is over."""
    for _, pairs in plan:
        for (model, prefill), some in groupby(pairs, lambda pair: (pair.model, pair.prefill)):
            side = Side(model, prefill)
            try:
                for pair in results.left(list(some), WAY):
                    if time.monotonic() >= until:
                        return
                    began = time.monotonic()
                    outcome, why = judge(side, pair.decode)
                    results.add(pair, WAY, outcome, time.monotonic() - began, why=why)
                    if why:
                        sys.stdout.write(f"{outcome.upper()} {pair}\n  {why}\n")
                        sys.stdout.flush()
            finally:
                side.close()


def table(results: Results, plan: Sequence[tuple[str, list[Pair]]]) -> Iterator[str]:
    """A line for each stage."""
    yield "| pairs | points | passed | refused | failed | late | left | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, pairs in plan:
        yield f"| {' | '.join(map(str, [name, *counted(results.lines(pairs, WAY), len(pairs))]))} |"


def main() -> int:
    """Runs, and prints what is known at this commit."""
    parser = argparse.ArgumentParser(prog="make matrix-pd", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="no pair begins later")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "matrix-pd.jsonl")
    parser.add_argument("--only", metavar="TEXT", default="", help="stages in whose name this is")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks are threads already
    results, plan = Results(options.results, commit()), [s for s in stages() if options.only in s[0]]
    work(results, plan, time.monotonic() + 60 * options.minutes)
    wrong = [line for _, pairs in plan for line in results.wrong(pairs, WAY)]
    sys.stdout.write("\n".join([f"At commit {results.commit}:", *table(results, plan), *wrong]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
