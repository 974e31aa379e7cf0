"""A prefill and a decode engine in this process, whole: planner, ranks, courier, bootstrap service, transfer engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from tessera.core.messages import (
    Abort,
    Address,
    Fatal,
    HandoverTimes,
    Outbound,
    Output,
    Outputs,
    StepReport,
    Stop,
    Submit,
)
from tessera.run.core import EngineCore
from tiny import Answer, TinyModel, all_free, resolved

WAIT_S = 60.0


class Server:
    """An engine core in a thread, and what it says, by request."""

    def __init__(self, model: TinyModel, role: str, **flags: Any) -> None:
        self.answers: dict[tuple[str, int], Answer] = {}
        self.errors: dict[str, str] = {}
        self.handed: dict[str, HandoverTimes] = {}
        self.reports: list[StepReport] = []
        self.fatal: Fatal | None = None
        self._changed = threading.Condition()
        asked = {"disaggregation_mode": role, "disaggregation_bootstrap_port": 0, **flags}
        self.core = EngineCore(resolved(model.spec, **asked), model.spec, model.source, self._sink)
        self.thread = threading.Thread(target=self.core.run, name=f"core-{role}")
        self.thread.start()

    def _sink(self, message: Outbound) -> None:
        with self._changed:
            if isinstance(message, Outputs):
                for output in message.items:
                    self._note(output)
            elif isinstance(message, StepReport):
                self.reports.append(message)
            elif isinstance(message, Fatal):
                self.fatal = message
            self._changed.notify_all()

    def _note(self, output: Output) -> None:
        answer = self.answers.setdefault((output.request_id, output.choice), Answer())
        assert answer.finish is None, f"{output} after the end"
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert answer.prompt_logprobs is None, "prompt logprobs twice"
            answer.prompt_logprobs = output.prompt_logprobs
        answer.finish = output.finish
        answer.num_cached = max(answer.num_cached, output.num_cached)
        if output.handed is not None:
            assert output.request_id not in self.handed, "told twice"
            self.handed[output.request_id] = output.handed
        if output.error is not None:
            self.errors[output.request_id] = output.error

    @property
    def address(self) -> Address:
        found = self.core.handover.bootstrap if self.core.handover is not None else None
        assert found is not None
        return found

    def post(self, submit: Submit) -> None:
        self.core.post(submit)

    def abort(self, request_id: str) -> None:
        self.core.post(Abort(request_id))

    def until(self, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self.fatal is not None, seconds):
                raise TimeoutError(f"it takes longer than {seconds:g} s")
        assert self.fatal is None, self.fatal

    def ended(self, names: Iterable[tuple[str, int]], seconds: float = WAIT_S) -> None:
        """Waits until all these choices have ended."""
        wanted = list(names)
        self.until(lambda: all(key in self.answers and self.answers[key].finish is not None for key in wanted), seconds)

    def free(self, seconds: float = WAIT_S) -> None:
        """Everything is free, soon."""
        until = time.monotonic() + seconds
        while not (all_free(self.core) and self.core.planner.idle):
            assert time.monotonic() < until, "pages or slots are held"
            time.sleep(0.01)

    def close(self) -> None:
        self.core.post(Stop())
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        assert self.fatal is None, self.fatal


class Pair:
    """Both, with one client."""

    def __init__(self, model: TinyModel, prefill: dict[str, Any], decode: dict[str, Any], **both: Any) -> None:
        self.model = model
        self.flags = {"prefill": {**both, **prefill}, "decode": {**both, **decode}}
        self.prefill = Server(model, "prefill", **self.flags["prefill"])
        try:
            self.decode = Server(model, "decode", **self.flags["decode"])
        except BaseException:
            self.prefill.close()
            raise
        self.rooms = 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.prefill.close()
        finally:
            self.decode.close()

    def post(self, submit: Submit) -> None:
        """Sends a request to both."""
        self.rooms += 1
        whole = msgspec.structs.replace(submit, bootstrap_room=self.rooms, bootstrap=self.prefill.address)
        self.prefill.post(whole)
        self.decode.post(whole)

    def answer(self, requests: list[Submit]) -> dict[tuple[str, int], Answer]:
        """Sends all and waits for all, and for everything to be free again."""
        keys = [(r.request_id, choice) for r in requests for choice in range(r.n)]
        for request in requests:
            self.post(request)
        self.decode.ended(keys)
        self.prefill.ended(keys)
        self.prefill.free()
        self.decode.free()
        return {key: self.decode.answers[key] for key in keys}
