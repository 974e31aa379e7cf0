"""What the planner's errands come to outside: meetings between a prefill and a decode server, and letters.

A prefill server listens at two ports: HTTP, where decode servers fetch its manifest (`GET /bootstrap`), and one for
connections. A connection is a session, and the peer of the planners (`plan/handoff.py`): decode says who it is, prefill
compares manifests and has its ranks reach those of decode, then both may send letters, each a length and a msgpack of
`Frame`. It ends when either side closes it, or is silent for too long. Where the two do not fit it is a session all the
same, in which decode says what ends by that, and leaves. All of it runs in one thread with an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field

import httpx
import msgspec

from tessera.core.config.types import HandoverConfig
from tessera.core.errors import PeerError, TesseraError
from tessera.core.messages import Address
from tessera.plan.handoff import Errand, Fence, Gone, Heard, Joined, Letter, Meet, Met, Tell, Unmet, Why, Wire
from tessera.run.bootstrap import Bootstrap, Service
from tessera.run.poster import Connect, Connected, Order, Part, Shut
from tessera.run.wire import array, encode
from tessera.transfer.manifest import Manifest, compare
from tessera.transfer.manifest import decode as decode_manifest
from tessera.transfer.manifest import encode as encode_manifest

log = logging.getLogger(__name__)

HELLO_S = 10.0  # from a connection to its first word
REACH_S = 30.0  # for all ranks to reach a peer's
CLOSE_S = 5.0
LEAST_BEAT_S = 0.01  # between two signs of life, whatever a peer asks for
MOST_BYTES = 1 << 28
LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A decode server's first word. `every`: seconds between the signs of life that it wants to hear. `refused`: why
    the two do not fit, where it has found that already."""

    manifest: bytes
    every: float
    refused: str | None = None


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """All ranks of prefill reach those of decode: letters may come, in this session. `every`: as in `Hello`."""

    session: str
    every: float


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """The two do not fit, or cannot reach each other: what ends by that may be said, in this session."""

    reason: str
    session: str = ""  # a server of an earlier release takes no letters then
    every: float = 1.0


class Beat(msgspec.Struct, tag=True, frozen=True):
    """A sign of life."""


class Mail(msgspec.Struct, tag=True, frozen=True):
    """A letter from planner to planner."""

    letter: Letter


Frame = Hello | Welcome | Refusal | Beat | Mail
decode_frame = msgspec.msgpack.Decoder(Frame, dec_hook=array).decode


@dataclass(eq=False)
class Line:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    reason: str = "it closed the connection"
    left: bool = False

    def say(self, frame: Frame) -> None:
        """Sends without waiting."""
        if not self.left:
            data = encode(frame)
            self.writer.write(LENGTH.pack(len(data)) + data)

    async def hear(self, seconds: float) -> Frame:
        """The next word. Raises `PeerError` when the other side has left, is silent for `seconds`, or babbles."""
        try:
            async with asyncio.timeout(seconds):
                (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                if length > MOST_BYTES:
                    raise PeerError(f"it announced {length} bytes; at most {MOST_BYTES} are taken")
                frame: Frame = decode_frame(await self.reader.readexactly(length))
                return frame
        except TimeoutError as error:
            raise PeerError(f"it has been silent for {seconds:g} s") from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise PeerError(self.reason) from error
        except msgspec.DecodeError as error:
            raise PeerError(f"it said what nobody understands: {error}") from error

    def close(self, reason: str) -> None:
        """Ends it at once; who still listens to it here hears `reason`."""
        self.reason, self.left = reason, True
        if not self.writer.transport.is_closing():
            self.writer.transport.abort()

    def leave(self, reason: str) -> None:
        """Says nothing more, and lets the other side end it when it has heard all; it has `CLOSE_S` for that. To close
        it here would drop what is under way, where something has come that is not read yet."""
        if not self.left and not self.writer.transport.is_closing():
            self.writer.write_eof()
            asyncio.get_running_loop().call_later(CLOSE_S, self.close, reason)
        self.reason, self.left = reason, True


@dataclass(eq=False)
class Session:
    """A line on which letters travel, and signs of life as often as the peer wants to hear them (`every`, seconds).
    `writers`: engines of the ranks that may write here."""

    line: Line
    every: float
    writers: tuple[str, ...] = ()


@dataclass(eq=False)
class Reaching:
    """Ranks that have not said yet whether they reach a peer."""

    missing: set[int]
    done: asyncio.Future[str | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Courier:
    """See above. `tell` gets events for the planner and orders for the ranks, from this thread; what it does must not
    block. Raises `ConfigError` when a port cannot be had."""

    def __init__(
        self,
        handover: HandoverConfig,
        host: str,
        manifest: Manifest,
        names: tuple[str, ...],
        tell: Callable[[Wire | Order], object],
    ) -> None:
        self.handover, self.manifest, self._names, self._tell = handover, manifest, names, tell
        self._sessions: dict[str, Session] = {}
        self._reaching: dict[str, Reaching] = {}
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: Future[None] = Future()
        self._service = Service(host, handover.bootstrap_port) if handover.role == "prefill" else None
        self._thread = threading.Thread(target=self._main, name="tessera-courier", daemon=True)
        self._thread.start()
        self._ready.result()

    @property
    def bootstrap(self) -> Address | None:
        """Where decode servers meet this one."""
        return self._service.address if self._service is not None else None

    def do(self, errand: Errand) -> None:
        """Runs an errand. From any thread."""
        self._call(self._do, errand)

    def news(self, news: Connected) -> None:
        """A rank reaches a peer, or not. From any thread."""
        self._call(self._connected, news)

    def close(self) -> None:
        """Ends every session."""
        self._call(self._ending.set)
        self._thread.join(CLOSE_S)

    def _call(self, work: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(work, *args)

    # -- in its thread ---------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if self._ready.done():
                log.exception("the courier failed: no prompt is handed over any more")
            else:
                self._ready.set_exception(error)

    async def _run(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            if self._service is not None:
                server = await asyncio.start_server(self._greet, self._service.address.host, 0)
                stack.push_async_callback(server.wait_closed)
                stack.callback(server.close)
                port = server.sockets[0].getsockname()[1]
                manifest = encode_manifest(self.manifest)
                service = asyncio.create_task(self._service.serve(Bootstrap(port, manifest, self._names)))
                stack.push_async_callback(lambda: service)
                stack.callback(self._service.stop)
            self._ready.set_result(None)
            await self._ending.wait()
            for session in self._sessions.values():
                session.line.close("this server ends")
            for task in tuple(self._tasks):
                task.cancel()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _do(self, errand: Errand) -> None:
        match errand:
            case Tell(peer, letter):
                if (session := self._sessions.get(peer)) is not None:
                    session.line.say(Mail(letter))
            case Meet(address):
                self._spawn(self._meet(address))
            case Fence(peer):
                session = self._sessions.pop(peer)
                session.line.leave("it is fenced")
                self._tell(Shut(peer, session.writers))

    # decode

    async def _meet(self, address: Address) -> None:
        try:
            async with asyncio.timeout(self.handover.decode_bootstrap_timeout):
                name, session, refused = await self._visit(address)
        except (TimeoutError, TesseraError, OSError, httpx.HTTPError) as error:
            late = f"it has not answered in {self.handover.decode_bootstrap_timeout:g} s"
            self._tell(Unmet(address, self._unusable(address, late if isinstance(error, TimeoutError) else error)))
            return
        self._sessions[name] = session
        self._tell(Met(address, name) if refused is None else Unmet(address, self._unusable(address, refused), name))
        await self._listen(name, session)

    def _unusable(self, address: Address, reason: object) -> Why:
        text = f"prefill server {address} cannot be used: {reason}"
        log.warning(text)
        return Why(text)

    async def _visit(self, address: Address) -> tuple[str, Session, str | None]:
        """Fetches who is there, compares, and asks to be welcomed. Gives the session, and why nothing is handed over
        in it. Raises when there is none."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://{address}/bootstrap", timeout=self.handover.decode_bootstrap_timeout)
        if answer.status_code != 200:
            raise PeerError(f"it answered {answer.status_code} to GET /bootstrap")
        try:
            found = msgspec.msgpack.decode(answer.content, type=Bootstrap)
        except msgspec.DecodeError as error:
            raise PeerError(f"what it sent from /bootstrap is no bootstrap record: {error}") from error
        refused = self._misfit(found.manifest)
        try:
            line = Line(*await asyncio.open_connection(address.host, found.port))
            line.say(Hello(encode_manifest(self.manifest), self.handover.heartbeat_interval, refused))
            return await self._answered(line, refused, found.names)
        except (PeerError, OSError) as error:
            raise PeerError(refused or str(error)) from error

    def _misfit(self, prefill: bytes) -> str | None:
        try:
            compare(decode_manifest(prefill), self.manifest)
        except TesseraError as error:
            return str(error)
        return None

    async def _answered(
        self, line: Line, refused: str | None, names: tuple[str, ...]
    ) -> tuple[str, Session, str | None]:
        try:
            answer = await line.hear(self.handover.decode_bootstrap_timeout if refused is None else HELLO_S)
            match answer:
                case Welcome(session, every) if refused is None:
                    return session, Session(line, every, names), None
                case Refusal(reason, session, every) if session:
                    return session, Session(line, every), refused or f"it refuses: {reason}"
                case Refusal(reason):
                    raise PeerError(f"it refuses: {reason}")
                case _:
                    raise PeerError(f"it said {type(answer).__name__} and welcomed nobody")
        except BaseException:
            line.close("not welcomed")
            raise

    # prefill

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        try:
            hello = await line.hear(HELLO_S)
            if not isinstance(hello, Hello):
                raise PeerError(f"it said {type(hello).__name__} and not who it is")
        except PeerError as error:
            log.warning("somebody at the port of decode servers is refused: %s", error)
            line.say(Refusal(str(error)))
            writer.close()
            return
        self._count += 1
        name, refused = f"{self.manifest.instance}-{self._count}", hello.refused
        try:
            if refused is None:
                await self._reach(name, decode_manifest(hello.manifest))
        except TesseraError as error:
            refused = str(error)
        session = self._sessions[name] = Session(line, hello.every)
        self._tell(Joined(name))
        if refused is None:
            line.say(Welcome(name, self.handover.heartbeat_interval))
        else:
            log.warning("a decode server is refused: %s", refused)
            self._tell(Part(name))
            line.say(Refusal(refused, name, self.handover.heartbeat_interval))
        await self._listen(name, session)

    async def _reach(self, name: str, manifest: Manifest) -> None:
        """Raises unless the two fit, and all ranks of this server reach those of decode."""
        compare(self.manifest, manifest)
        reaching = self._reaching[name] = Reaching(set(range(self.manifest.mesh.size)))
        self._tell(Connect(name, self.manifest, manifest))
        try:
            async with asyncio.timeout(REACH_S):
                error = await reaching.done
        except TimeoutError as late:
            raise PeerError(f"ranks {sorted(reaching.missing)} have not reached its ranks in {REACH_S:g} s") from late
        finally:
            del self._reaching[name]
        if error is not None:
            raise PeerError(error)

    def _connected(self, news: Connected) -> None:
        reaching = self._reaching.get(news.peer)
        if reaching is None or reaching.done.done():
            return
        reaching.missing.discard(news.rank)
        if news.error is not None:
            reaching.done.set_result(f"rank {news.rank} cannot reach its ranks: {news.error}")
        elif not reaching.missing:
            reaching.done.set_result(None)

    # both

    async def _listen(self, name: str, session: Session) -> None:
        """Letters, until the session ends; then the planner is told."""
        beating = asyncio.create_task(self._beat(session))
        try:
            async for letter in self._letters(session.line):
                self._tell(Heard(name, letter))
        except PeerError as error:
            reason = str(error)
            log.info("session %s has ended: %s", name, reason)
            session.line.close(reason)
            self._tell(Gone(name, reason))
            if self.handover.role == "prefill":
                del self._sessions[name]
                self._tell(Part(name))
        finally:
            beating.cancel()

    async def _letters(self, line: Line) -> AsyncIterator[Letter]:
        while True:
            match await line.hear(self.handover.silence):
                case Mail(letter):
                    if not line.left:
                        yield letter
                case Beat():
                    pass
                case other:
                    raise PeerError(f"it said {type(other).__name__} out of turn")

    async def _beat(self, session: Session) -> None:
        while True:
            await asyncio.sleep(max(LEAST_BEAT_S, session.every))
            session.line.say(Beat())
