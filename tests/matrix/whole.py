"""Whole servers in one event loop: engines in threads, ranks as threads, the app over them; and clients of its HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from serve.support import TEMPLATE, Visitor, byte_tokenizer
from tessera.core.messages import Fatal, Flush, Outbound, Stop
from tessera.run.core import EngineCore
from tessera.serve.app import make_app
from tessera.serve.chat import ChatTemplate
from tessera.serve.client import EngineClient
from tessera.serve.metrics import Metrics
from tessera.serve.router.rooms import Meeting, legs
from tessera.serve.schema import Limits, Reader
from tessera.serve.server import Options, Server
from tessera.serve.text import Tokenizer
from tiny import TinyModel, all_free, resolved

WAIT_S = 90.0
Flags = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a client: it comes when so many messages of engines have come, or when nothing else is open.

    `leaves`: after so many more the client goes ("leave") or asks for the end ("abort")."""

    path: str
    body: dict[str, Any]
    at: int = 0
    leaves: int | None = None
    how: str = "leave"


@dataclass
class Answered:
    """What came of a call: the status, then events of a stream or one body. `cut`: the client ended it."""

    status: int
    bodies: list[Any]
    stream: bool
    cut: bool = False


class Side:
    """One server. `flags`: of its engines, of which there are `replicas`."""

    def __init__(self, model: TinyModel, replicas: int = 1, **flags: Any) -> None:
        self.loop, self.changed = asyncio.get_running_loop(), asyncio.Event()
        self.messages, self.fatal = 0, ""
        interval = flags.pop("stream_interval", 1)
        made = resolved(model.spec, **flags)
        self.cores = [
            EngineCore(made, model.spec, model.source, partial(self._sink, number)) for number in range(replicas)
        ]
        self.client = EngineClient([core.post for core in self.cores], silence=WAIT_S)
        tokenizer = Tokenizer(byte_tokenizer())
        template = ChatTemplate(TEMPLATE, {"eos_token": "<|im_end|>"})
        reader = Reader(Limits.of(made.config, model.spec.vocab_size), tokenizer, template, seed=0)
        page = made.config.memory.page_size
        options = Options("path", "tiny", stream_interval=interval)
        server = Server(self.client, reader, options, Metrics("tiny", page, made.config.mesh.num_dp))
        self.client.on_report = server.metrics.step
        self.app, self.num_dp = make_app(server), made.config.mesh.num_dp
        self.threads = [threading.Thread(target=core.run, name="core") for core in self.cores]
        for thread, replica in zip(self.threads, self.client.replicas, strict=True):
            replica.warm.set()
            thread.start()

    def _sink(self, number: int, message: Outbound) -> None:
        self.loop.call_soon_threadsafe(self._heard, number, message)

    def _heard(self, number: int, message: Outbound) -> None:
        if isinstance(message, Fatal):
            self.fatal = message.error
            self.client.fail(RuntimeError(message.error))  # type: ignore[arg-type]
        else:
            self.client.deliver(message, number)
        self.messages += 1
        self.changed.set()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something that messages bring about, or a moment."""
        until = time.monotonic() + WAIT_S
        while not condition():
            assert not self.fatal, self.fatal
            assert time.monotonic() < until, f"it takes too long: {what}"
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), 0.02)
            except TimeoutError:
                continue

    async def free(self) -> None:
        """Nothing is held, and with an empty prefix cache nothing at all."""
        cores = self.cores
        await self.until(lambda: all(c.planner.idle and all_free(c) for c in cores) and not len(self.client), "free")
        self.client.send(Flush())
        ranks = [rank.state for core in cores for rank in core.planner.ranks]
        await self.until(lambda: all(s.pages.num_used == 0 and not s.leases for s in ranks), "flushed")
        for state in ranks:
            assert state.load.num_requests == state.load.num_tokens == 0, state.load

    async def close(self) -> None:
        """Ends the engines."""
        for core in self.cores:
            core.post(Stop())
        for thread in self.threads:
            await asyncio.to_thread(thread.join, WAIT_S)
            assert not thread.is_alive()
        assert not self.fatal, self.fatal
        for core in self.cores:
            core.planner.check()


class Deployment:
    """One server, or prefill and decode apart behind what the router does to bodies."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides, self.last = sides, sides[-1]
        self.rooms, self.open, self.rids = count(1), 0, count()

    @property
    def messages(self) -> int:
        """That have come from engines."""
        return sum(side.messages for side in self.sides)

    def _bodies(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        if len(self.sides) == 1:
            return [body]
        first = self.sides[0]
        handover = first.cores[0].handover
        assert handover is not None
        assert handover.bootstrap is not None
        at = Meeting(handover.bootstrap.host, handover.bootstrap.port, first.num_dp)
        # Batches take a row of rooms from one: a prompt each.
        return list(legs(body, at, 0, lambda bits: next(self.rooms) * first.num_dp))

    async def ask(self, call: Call) -> Answered:
        """Sends a call, and waits for its end."""
        self.open += 1
        rid = call.body.get("rid", f"rid{next(self.rids)}")
        bodies = self._bodies({**call.body, "rid": rid})
        visits = [
            Visitor(side.app, call.path, [json.dumps(body).encode()])
            for side, body in zip(self.sides, bodies, strict=True)
        ]
        cut, began = False, self.messages
        try:
            while not all(visit.task.done() for visit in visits):
                if call.leaves is not None and not cut and self.messages >= began + call.leaves:
                    cut = True
                    await self._end(visits, rid, call.how)
                if not cut and any(v.task.done() and (v.status or 500) >= 400 for v in visits):
                    for visit in visits:  # as the router does: the first that fails ends both
                        visit.left.set()
                looks = 0.005 if call.leaves is not None and not cut else None
                left = [visit.task for visit in visits if not visit.task.done()]
                if left:  # an end that was asked for may have come meanwhile
                    await asyncio.wait(left, timeout=looks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.open -= 1
        for visit in visits:
            visit.task.result()
        first, visit = visits[0], visits[-1]
        if not cut and visit.status == 200:
            assert first.status == 200, first.got
        return read(visit, cut)

    async def _end(self, visits: list[Visitor], rid: str, how: str) -> None:
        if how == "leave":
            for visit in visits:
                visit.left.set()
            return
        for side in self.sides:
            await Visitor(side.app, "/abort_request", [json.dumps({"rid": rid}).encode()]).task

    async def all(self, calls: Sequence[Call]) -> list[Answered]:
        """Sends each when it is due."""
        tasks: dict[int, asyncio.Task[Answered]] = {}
        for i in sorted(range(len(calls)), key=lambda i: calls[i].at):
            await self.last.until(lambda i=i: self.messages >= calls[i].at or not self.open, "a turn")
            tasks[i] = asyncio.create_task(self.ask(calls[i]))
            await asyncio.sleep(0)
        return [await asyncio.wait_for(tasks[i], WAIT_S) for i in range(len(calls))]


def read(visit: Visitor, cut: bool) -> Answered:
    """What a visitor got."""
    if not visit.got:
        assert cut, "no answer"
        return Answered(499, [], False, cut)
    status = int(visit.got[0]["status"])
    stream = any(b"text/event-stream" in value for _, value in visit.got[0]["headers"])
    text = b"".join(part.get("body", b"") for part in visit.got[1:]).decode()
    if not stream:
        return Answered(status, [json.loads(text)] if text else [], False, cut)
    parts = text.split("\n\n")
    if not cut:
        assert parts[-2:] == ["data: [DONE]", ""], parts[-2:]
    whole = [part.removeprefix("data: ") for part in parts[:-1]]
    return Answered(status, [json.loads(part) for part in whole if part != "[DONE]"], True, cut)


async def deployed(model: TinyModel, servers: Sequence[Flags], calls: Sequence[Call]) -> list[Answered]:
    """Serves calls, and checks that everything is free after it. Two servers: prefill and decode."""
    roles = ["prefill", "decode"] if len(servers) == 2 else ["null"]
    sides: list[Side] = []
    try:
        for role, flags in zip(roles, servers, strict=True):
            more = {} if role == "null" else {"disaggregation_mode": role, "disaggregation_bootstrap_port": 0}
            sides.append(Side(model, **{**flags, **more}))
        answers = await Deployment(sides).all(calls)
        for side in sides:
            await side.free()
        return answers
    finally:
        for side in sides:
            await side.close()
