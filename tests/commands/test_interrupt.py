"""Ctrl-C: a chat goes on with the next question; anything else ends in one line and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from commands.support import COMMAND, FLAGS, QUIET, fill, run, session, started
from evals.scripted import Scripted
from tessera.client import Ask
from tessera.commands import chat
from tessera.commands.clients import Session
from tessera.core.errors import RequestError
from waits import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("model"))


def is_loading_libraries(process: subprocess.Popen[str]) -> bool:
    return "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()


def is_sending(process: subprocess.Popen[str]) -> bool:
    assert process.stderr is not None
    return process.stderr.readline().startswith("Sending 400 requests")


@pytest.mark.parametrize("when", [is_loading_libraries, is_sending])
def test_ctrl_c_ends_a_bench_and_every_process_of_it(folder: Path, when: object) -> None:
    assert callable(when)
    argv = ["--num-prompts", "400", "--output-len", "1500", "--warmup", "0"]
    with started("bench", "--model-path", str(folder), *FLAGS, *QUIET, *argv) as process:
        wait_until(lambda: when(process))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, out, err) == (130, "", "tessera: interrupted\n")
        wait_until(lambda: session(process.pid) == [])


def test_ctrl_c_while_the_flags_are_loaded() -> None:
    python, *rest = COMMAND
    command = [python, "-X", "importtime", *rest, "serve", "--model-path", "none"]
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)  # a tenth of what follows: nobody reads, and it cannot be over before
    with subprocess.Popen(command, stderr=theirs) as process, os.fdopen(ours, "rb", buffering=0) as said:
        os.close(theirs)
        err = b""
        while not re.search(rb"tessera\.core\.errors\n.*\n", err):  # it is the last at the top: the next is in `main`
            read = said.read(256)
            assert read, err
            err += read
        process.send_signal(signal.SIGINT)
        err = said.readall()
        process.wait(PATIENCE_S)
    assert err.endswith(b"tessera: interrupted\n")
    # Python itself ends by the signal where one interrupts an `exec` of the source of a module.
    assert process.returncode in (130, -signal.SIGINT)


def talk(
    lines: str, client: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    @contextmanager
    def scripted(*_: object) -> Iterator[Session]:
        with asyncio.Runner() as runner:
            yield Session(client, runner, "a script")

    monkeypatch.setattr(chat, "session", scripted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, _ = run(capsys, "chat")
    assert code == 0
    return out.splitlines()


class Interrupted(list[str | Exception]):
    """Words of which somebody has enough after five."""

    def __iter__(self) -> Iterator[str | Exception]:
        for count, word in enumerate(super().__iter__()):
            if count == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield word


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(ask: Ask) -> list[str | Exception]:
        assert ask.messages is not None
        if ask.messages[-1]["content"] != "long":
            return ["fine"]
        return Interrupted(["la "] * 1000)

    client = Scripted(say, pause=0.01)
    lines = talk("long\nshort\n", client, monkeypatch, capsys)
    assert client.stopped == 1
    assert lines[0].count("la") == 5
    assert lines[-1] == "fine"
    said = [m["content"].strip() for m in client.asked[-1].messages or ()]
    assert said == ["long", lines[0].strip(), "short"]


def test_a_question_that_is_refused_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(ask: Ask) -> list[str | Exception]:
        assert ask.messages is not None
        return [RequestError("too long")] if ask.messages[-1]["content"] == "x" else ["ok"]

    client = Scripted(say)
    assert talk("x\ny\n", client, monkeypatch, capsys) == ["ok"]
    assert [m["content"] for m in client.asked[-1].messages or ()] == ["y"]


def test_a_chat_in_a_terminal_ends_with_ctrl_d(folder: Path) -> None:
    ours, theirs = pty.openpty()
    argv = [*COMMAND, "chat", str(folder), *FLAGS, "--max-tokens", "3"]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = bytearray()

    def has(text: bytes) -> bool:
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(ours, 65536))
        return text in seen

    try:
        wait_until(lambda: has(b"Ctrl-D leaves") and has(b"> "))
        process.send_signal(signal.SIGINT)  # at the prompt: the line is dropped, the chat is not
        os.write(ours, b"hello\n")
        wait_until(lambda: has(b"hello") and b"> " in seen.partition(b"hello")[2])  # not the prompt before it
        assert process.poll() is None
        os.write(ours, b"\x04")
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in seen
