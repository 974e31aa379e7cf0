"""`make matrix-pd`: every pair of a prefill and a decode layout answers as one rank, on random and on trained models.

Layouts are (attention TP, DP) with each attention TP in 1, 2, 4. One prefill server meets all decode servers in turn.
Exit code 1 when a pair has failed; each is a line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from run.pd import Server
from tessera.core.messages import SamplingParams, Submit
from test_trained import trained
from tiny import TinyModel, serve, tiny_model

LAYOUTS = tuple((attn, dp) for attn in (1, 2, 4) for dp in (1, 2))
NUM = 64
WAIT_S = 600.0
RANDOM = ("qwen3", "hybrid", "mla")
TRAINED = ("abacus-hybrid", "abacus-mla")


def flags(attn: int, dp: int) -> dict[str, Any]:
    """Those of a layout."""
    return {"tp": attn * dp, "dp": dp, "enable_dp_attention": True} if dp > 1 else {"tp": attn}


def shown(layout: tuple[int, int]) -> str:
    """For people."""
    return f"TP {layout[0]} DP {layout[1]}"


def model_of(name: str) -> tuple[TinyModel, dict[str, Any]]:
    """A model, and the flags under which answers must be equal."""
    if name in TRAINED:
        return trained(name), {"dtype": "float32", "page_size": 16, "max_total_tokens": 8192}
    return tiny_model(name), {"dtype": "float64"}


def prompts(vocab_size: int) -> list[Submit]:
    """Greedy, from one token to several chunks of 32."""
    made = []
    for i in range(NUM):
        tokens = [2 + (i * 13 + k * (1 + i % 5)) % (vocab_size - 4) for k in range(1 + (i * 7) % 130)]
        made.append(Submit(f"r{i}", tokens, SamplingParams(temperature=0.0, max_new_tokens=4 + i % 5, ignore_eos=True)))
    return made


def pairs(name: str, only: int, skip: int) -> Iterator[tuple[str, str, float]]:
    """Every pair of layouts of a model: which, what was wrong ("" where nothing was), and its seconds."""
    model, exact = model_of(name)
    both = {**exact, "chunked_prefill_size": 32, "watchdog_timeout": 120.0}
    asked = prompts(model.spec.vocab_size)
    wanted = serve(model, asked, **both).tokens()
    room = 0
    for source in LAYOUTS[skip:only]:
        prefill = Server(model, "prefill", **both, **flags(*source))
        try:
            for target in LAYOUTS[:only]:
                began, which = time.monotonic(), f"{name}: prefill {shown(source)}, decode {shown(target)}"
                decode = Server(model, "decode", **both, **flags(*target))
                try:
                    wrong = one(prefill, decode, asked, wanted, f"{room}/", room * NUM)
                finally:
                    decode.close()
                room += 1
                yield which, wrong, time.monotonic() - began
        finally:
            prefill.close()


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


def main() -> int:
    """Runs all, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[*RANDOM, *TRAINED])
    parser.add_argument("--layouts", type=int, default=len(LAYOUTS), help="Only the first few.")
    parser.add_argument("--skip", type=int, default=0, help="Leave out the first few as prefill.")
    options = parser.parse_args()
    failed = 0
    for name in options.models:
        for which, wrong, seconds in pairs(name, options.layouts, options.skip):
            failed += bool(wrong)
            sys.stdout.write(f"{'FAILED' if wrong else 'ok'} {which} ({seconds:.1f} s) {wrong}\n")
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
