"""How long a prompt that has landed waits until decode goes on with it: `python bench/handover_wait.py [--json]`.

A prefill and a decode engine in this process, with `abacus-hybrid`; the ranks of prefill in this process or in others.
From the end of a prompt's last copy (decode's side copies) to when decode is told, and to its first token. `busy`:
prefill computes other prompts meanwhile, in chunks, so that a step is always under way.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from tessera.core.messages import Fatal, Outbound, Output, Outputs, SamplingParams, Stop, Submit
from tessera.run.core import EngineCore, prepared_core
from tessera.run.startup import prepare
from tessera.transfer.host import HostSource

WAIT_S = 120.0
BOTH: dict[str, Any] = {
    "model_path": "abacus-hybrid",
    "device": "cpu",
    "max_running_requests": 8,
    "max_total_tokens": 1 << 15,
    "disaggregation_bootstrap_port": 0,
    "disable_radix_cache": True,
}
RANKS: dict[str, dict[str, Any]] = {"one, in the engine's process": {}, "two processes": {"tp": 2}}
FIRST = SamplingParams(temperature=0.0, max_new_tokens=1, ignore_eos=True)
SCORED = SamplingParams(max_new_tokens=0)


class Server:
    """An engine in a thread, and when its requests were told what."""

    def __init__(self, role: str, **flags: Any) -> None:
        self.said: dict[str, dict[str, float]] = {}
        self._changed = threading.Condition()
        self.core: EngineCore = prepared_core(prepare({**BOTH, "disaggregation_mode": role, **flags}, {}), self._sink)
        self._thread = threading.Thread(target=self.core.run, daemon=True)
        self._thread.start()

    def _sink(self, message: Outbound) -> None:
        now = time.perf_counter()
        with self._changed:
            if isinstance(message, Fatal):
                raise RuntimeError(message.error)
            for output in message.items if isinstance(message, Outputs) else ():
                self._note(output, now)
            self._changed.notify_all()

    def _note(self, output: Output, now: float) -> None:
        if output.error is not None:
            raise RuntimeError(output.error)
        times = self.said.setdefault(output.request_id, {})
        for what, there in (("told", output.handed), ("drawn", output.tokens), ("ended", output.finish)):
            if there:
                times.setdefault(what, now)

    def until(self, request_id: str, what: str) -> float:
        """When it was told; waits for it."""
        with self._changed:
            if not self._changed.wait_for(lambda: what in self.said.get(request_id, {}), WAIT_S):
                raise TimeoutError(f"{request_id} was not {what} in {WAIT_S:g} s")
            return self.said[request_id][what]

    def close(self) -> None:
        """Ends it."""
        self.core.post(Stop())
        self._thread.join(WAIT_S)


class Busy:
    """Keeps a prefill server computing prompts that go nowhere."""

    def __init__(self, server: Server, tokens: int) -> None:
        self._server, self._tokens, self._end = server, tokens, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        names: list[str] = []
        while not self._end.is_set():
            names.append(f"busy {len(names)}")
            self._server.core.post(Submit(names[-1], [7] * self._tokens, SCORED))
            if len(names) > 1:  # the next one waits already
                self._server.until(names[-2], "ended")
        self._server.until(names[-1], "ended")

    def close(self) -> None:
        """When what it asked for is done."""
        self._end.set()
        self._thread.join(WAIT_S)


def measured(prefill: Server, decode: Server, rounds: int, tokens: int) -> dict[str, float]:
    """Milliseconds after the last copy, over hand-overs one after the other."""
    landed: list[float] = []
    copy = HostSource.copy

    def watched(self: HostSource, *args: Any) -> None:
        copy(self, *args)
        landed.append(time.perf_counter())

    told, drawn = [], []
    assert prefill.core.handover is not None
    with mock.patch.object(HostSource, "copy", watched):
        for _ in range(rounds + 1):  # the first meets the server
            room = len(decode.said) + 1
            name = f"asked {room}"
            submit = Submit(name, [9] * tokens, FIRST, bootstrap_room=room, bootstrap=prefill.core.handover.bootstrap)
            for server in (prefill, decode):
                server.core.post(submit)
            prefill.until(name, "ended")
            first = decode.until(name, "drawn")
            last = max(at for at in landed if at < decode.said[name]["told"])
            told.append(decode.said[name]["told"] - last)
            drawn.append(first - last)
    found = {"told": np.array(told[1:]), "first token": np.array(drawn[1:])}
    marks = (("median", 50), ("90 %", 90))
    return {
        f"{what}, {mark}": round(1e3 * float(np.percentile(times, share)), 2)
        for what, times in found.items()
        for mark, share in marks
    }


def lines(rounds: int, tokens: int, chunk: int) -> Iterator[dict[str, object]]:
    """A line for ranks of each kind, with prefill quiet and busy."""
    decode = Server("decode")
    for ranks, flags in RANKS.items():
        prefill = Server("prefill", chunked_prefill_size=chunk, **flags)
        yield {"ranks of prefill": ranks, "prefill": "quiet", **measured(prefill, decode, rounds, tokens)}
        busy = Busy(prefill, 4 * chunk)
        yield {"ranks of prefill": ranks, "prefill": "busy", **measured(prefill, decode, rounds, tokens)}
        busy.close()
        prefill.close()
    decode.close()


def main() -> int:
    """The command."""
    ask = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    ask.add_argument("--rounds", type=int, default=40)
    ask.add_argument("--tokens", type=int, default=200, help="of a prompt that is handed over")
    ask.add_argument("--chunk", type=int, default=512)
    ask.add_argument("--json", action="store_true")
    asked = ask.parse_args()
    torch.set_num_threads(1)
    for number, line in enumerate(lines(asked.rounds, asked.tokens, asked.chunk)):
        if not asked.json and not number:
            sys.stdout.write(f"| {' | '.join(line)} |\n|{'---|' * len(line)}\n")
        sys.stdout.write((json.dumps(line) if asked.json else f"| {' | '.join(map(str, line.values()))} |") + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
