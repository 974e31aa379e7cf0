"""The engine processes of one server: started, listened to, and what is done when one ends (`--on-failure`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from tessera.core.config import ServingConfig
from tessera.core.errors import DeadlineError, PeerError, TesseraError
from tessera.core.messages import Fatal, Ready
from tessera.serve.client import EngineClient
from tessera.serve.process import WORKER, EngineProcess
from tessera.serve.wire import Begin, Loading, Refusal, Starting, Upward

log = logging.getLogger(__name__)
Advance = Callable[[int, int], None]
Probe = Callable[[int], Awaitable[float]]

WATCH_SECONDS = 0.5
SAY_SECONDS = 2.0  # an engine whose ranks hang notices it as soon as we do, and knows more about it
LOOKS = round(SAY_SECONDS / WATCH_SECONDS)


class Fleet:
    """One engine process, and further ones when the first has resolved what was asked. `command`: see `EngineProcess`.

    Each is a replica of the client. `advance` is told how far their weights are loaded.
    """

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._engines = [EngineProcess(command)]
        self._loaded: dict[int, tuple[int, int]] = {}
        self.advance: Advance = lambda done, total: None

    async def resolve(self, asked: Mapping[str, object], environ: Mapping[str, str]) -> Upward | None:
        """What the first engine makes of what is asked: `Starting` or a refusal; None when it has ended."""
        self._begin = Begin(dict(asked), dict(environ))
        self._engines[0].send(self._begin)
        return await self._engines[0].receive()

    def grow(self, starting: Starting) -> None:
        """Starts the other replicas of what the first one resolved."""
        self._known = starting
        for number in range(1, starting.resolved.config.mesh.replicas):
            self._engines.append(self._started(number))

    def _started(self, number: int) -> EngineProcess:
        """A further engine, of the same configuration."""
        engine = EngineProcess(self._command)
        engine.send(Begin(self._begin.asked, self._begin.environ, self._known, number))
        return engine

    @property
    def sends(self) -> list[Callable[..., None]]:
        """Hands a message to each engine."""
        return [engine.send for engine in self._engines]

    async def keep(self, client: EngineClient, probe: Probe) -> None:
        """Hands on what the engines say, until cancelled. One that ends is dealt with as asked."""
        after = Aftermath(self._known.resolved.config.serving, client)
        try:
            kept = [self._keep(number, client, probe, after) for number in range(len(self._engines))]
            await asyncio.gather(self._watch(client), *kept)
        except Exception as error:
            log.exception("the engines cannot be looked after any more")
            client.fail(PeerError(f"{type(error).__name__}: {error}"))

    async def _keep(self, number: int, client: EngineClient, probe: Probe, after: Aftermath) -> None:
        replica = client.replicas[number]
        while True:
            await self._live(number, client, probe)
            served = replica.warm.is_set()
            client.lost(number, PeerError(self._engines[number].end()))
            if not after(number, served):
                return
            self._engines[number].close()
            self._engines[number] = self._started(number)
            replica.renew(self._engines[number].send)

    async def _watch(self, client: EngineClient) -> None:
        """One that hangs is ended: what follows is what follows any end. It is looked at several times, since whoever
        was stopped himself finds all engines silent at first."""
        late = [0] * len(self._engines)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for number, replica in enumerate(client.replicas):
                late[number] = late[number] + 1 if replica.stale and replica.failure is None else 0
                if late[number] > LOOKS:
                    replica.give_up()
                    self._engines[number].kill()

    async def _live(self, number: int, client: EngineClient, probe: Probe) -> None:
        """Until the engine has ended."""
        engine, replica = self._engines[number], client.replicas[number]
        probing: asyncio.Task[None] | None = None
        try:
            while (message := await engine.receive()) is not None:
                if isinstance(message, Loading):
                    replica.alive()
                    self._loaded[number] = message.done, message.total
                    self.advance(*map(sum, zip(*self._loaded.values(), strict=True)))
                elif isinstance(message, Refusal):
                    replica.fail(PeerError("; ".join(map(str, message.conflicts))))
                elif isinstance(message, Starting):
                    replica.alive()
                else:
                    client.deliver(message, number)
                if isinstance(message, Ready):
                    probing = asyncio.create_task(self._warm(number, client, probe))
                elif isinstance(message, Fatal):
                    engine.kill()  # it has said all that it has to say, and its ranks end with it
        finally:
            if probing is not None:
                probing.cancel()
                await asyncio.gather(probing, return_exceptions=True)

    async def _warm(self, number: int, client: EngineClient, probe: Probe) -> None:
        """A real generation, after which the replica takes requests; without one it ends."""
        replica = client.replicas[number]
        try:
            seconds = replica.allowed
            async with asyncio.timeout(seconds):
                replica.first_s = await probe(number)
        except TimeoutError:
            replica.fail(DeadlineError(f"waited {seconds:g} s for the first token"))
        except TesseraError as error:
            replica.fail(error)
        else:
            replica.warm.set()
            return
        self._engines[number].kill()

    def end(self) -> str:
        """How the first engine has ended, for people."""
        return self._engines[0].end()

    async def ended(self, seconds: float) -> bool:
        """Waits up to `seconds` for all to end; whether they have."""
        return all(await asyncio.gather(*(engine.ended(seconds) for engine in self._engines)))

    def kill(self) -> None:
        """Ends all at once."""
        for engine in self._engines:
            engine.kill()

    def close(self) -> None:
        """Ends all, and closes the wires. May be called again."""
        for engine in self._engines:
            engine.close()


class Aftermath:
    """What follows the end of an engine: the end of the server, another engine, or nothing while others go on."""

    def __init__(self, serving: ServingConfig, client: EngineClient) -> None:
        self._serving, self._client = serving, client
        self._restarts: deque[float] = deque()

    def __call__(self, number: int, served: bool) -> bool:
        """Whether another one is to be started. `served`: it was ready; a first start that fails ends the server."""
        failure, serving = self._client.replicas[number].failure, self._serving
        assert failure is not None
        if self._client.failure is not None:
            return False
        if served or self._restarts:
            if serving.on_failure == "restart" and self._restart(failure):
                return True
            if serving.on_failure == "continue" and self._others():
                log.error("%s; the others go on (--on-failure continue)", failure)
                return False
        self._client.fail(failure)
        return False

    def _others(self) -> bool:
        return any(replica.failure is None for replica in self._client.replicas)

    def _restart(self, failure: TesseraError) -> bool:
        serving, now = self._serving, time.monotonic()
        window, most = serving.restart_window, serving.max_restarts
        while self._restarts and now - self._restarts[0] > window:
            self._restarts.popleft()
        if len(self._restarts) >= most:
            log.error(
                "%s; it was started anew %d times within %g s, which is all (--max-restarts)", failure, most, window
            )
            return False
        self._restarts.append(now)
        log.warning("%s; it is started anew: %d of %d times in %g s", failure, len(self._restarts), most, window)
        return True
