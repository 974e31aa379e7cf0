"""A flag is honoured or refused by name: on every command, all that is wrong together, and quickly."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from commands.support import COMMAND, run
from tessera import __version__
from tessera.commands.options import COMMANDS, PREFIX, THEIRS, Command, _Form, _parser, parse
from tessera.core.config import BY_KEY, FLAGS
from tessera.core.errors import ConfigError

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "starlette", "uvicorn", "httpx", "zmq", "rich")
BY_NAME = {command.name: command for command in COMMANDS}
OF_ENGINE = [command for command in COMMANDS if command.engine]
# Left out, they ask for nothing: no default could be told.
NOTHING = {"model_path", "quantization", "revision", "api_key", "log_events", "dist_init_addr", "speculative_algorithm"}
WORDS = {"eval": ["--task", "gsm8k"]}


def refused(name: str, *argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(BY_NAME[name], [*WORDS.get(name, []), *argv])
    return [str(c) for c in caught.value.conflicts]


@pytest.mark.parametrize("command", OF_ENGINE, ids=lambda c: c.name)
def test_every_engine_flag_is_known_in_every_spelling(command: Command) -> None:
    known = {s: a.dest for a in _parser(command)._actions for s in a.option_strings}
    for flag in FLAGS:
        for spelling in flag.spellings:
            taken = known.get(spelling) == PREFIX + flag.name
            assert taken == (command.serves or flag.group != "serving"), spelling


@pytest.mark.parametrize("command", OF_ENGINE, ids=lambda c: c.name)
def test_a_wrong_flag_gets_a_hint_and_exit_code_2(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command.name, *WORDS.get(command.name, []), "--page-sise", "16")
    assert (code, out) == (2, "")
    assert "--page-sise: there is no such flag here. Did you mean --page-size" in err
    assert "Traceback" not in err


def test_a_flag_that_is_like_no_other_is_sent_to_the_help_of_its_own_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Known fault: whatever the command, it was `tessera serve --help`, which does not know the flags of `eval`."""
    for words in (["eval", "--task", "recall"], ["bench"], ["router", "--worker", "http://h:1"]):
        code, _, err = run(capsys, *words, "--xyzzy")
        assert (code, f"See `tessera {words[0]} --help` for all of them." in err) == (2, True), err


def test_the_tasks_of_an_evaluation_are_told_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "eval", "abacus-hybrid")
    assert code == 2
    assert "--task {gsm8k,gpqa,recall}" in err


def test_an_evaluation_is_asked_for_with_sglangs_flags_as_well() -> None:
    command = next(c for c in COMMANDS if c.name == "eval")
    argv = ["--eval-name=gpqa", "--num-examples=3", "--num-threads=2", "--data-path=x", "--max-new-tokens=5"]
    asked, _ = parse(command, argv)
    told = (asked.task, asked.num_questions, asked.parallel, str(asked.data), asked.max_tokens)
    assert told == ("gpqa", 3, 2, "x", 5)


@pytest.mark.parametrize("command", OF_ENGINE, ids=lambda c: c.name)
def test_what_is_not_built_is_refused_by_name(command: Command) -> None:
    text = refused(command.name, "--pp-size", "2", "--enable-lora", "--kv-cache-dtype=fp4_e2m1")
    assert {t.split(":")[0] for t in text} == {"--enable-lora", "--pp-size 2", "--kv-cache-dtype fp4_e2m1"}
    assert all("not built yet" in t for t in text)


def test_everything_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "serve", "--prot", "1", "--port", "x", "--page-size", "0", "--pp", "2", "--tp-size=0")
    assert code == 2
    for text in (
        "--prot: there is no such flag",
        "--port: found 'x'",
        "--page-size: found '0'",
        "--pp-size 2: not built",
    ):
        assert text in err
    assert "--tp-size: found '0'" in err


@pytest.mark.parametrize("command", OF_ENGINE, ids=lambda c: c.name)
def test_bad_values_and_bad_combinations_are_told_in_one_round(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [*WORDS.get(command.name, []), "--device", "cpu", "--page-size", "0", "--tp", "2", "--ep", "3"]
    code, _, err = run(capsys, command.name, *argv, "--model-path", "abacus-mla")
    assert code == 2
    assert "--page-size: found '0'" in err
    assert "--ep-size 3 with --tp-size 2: 3 does not divide 2" in err
    assert err.count("\n- ") == 2
    file = tmp_path / "flags.yaml"
    file.write_text("context-length: 10000000\n")
    code, _, err = run(capsys, command.name, *argv, "--config", str(file), "--model-path", "abacus-mla", "--frob", "3")
    assert [line.split(":")[0] for line in err.splitlines()[1:]] == [
        "- --frob",
        "- --page-size",
        "- --ep-size 3 with --tp-size 2",
        "- --context-length 10000000 with the model",
    ]


def test_beside_a_bad_value_a_model_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "serve", "--page-size", "0", "--model-path", "no-such-model")
    assert code == 2
    assert "--page-size: found '0'" in err
    assert "--model-path no-such-model: " in err
    code, _, err = run(capsys, "serve", "--page-size", "0")
    assert "--model-path: no model was named" in err


def test_nothing_of_an_engine_is_judged_for_a_running_server(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "bench", "--url", "http://127.0.0.1:9", "--page-size", "0")
    assert (code, "--page-size: found '0'" in err, "no model" in err) == (2, True, False)


def test_a_server_has_its_flags_and_a_client_has_not() -> None:
    _, asked = parse(BY_NAME["serve"], ["--port", "5", "--stream-interval", "3"])
    assert asked == {"port": "5", "stream_interval": "3"}
    (text,) = refused("bench", "--stream-interval", "3")
    assert text.startswith("--stream-interval: there is no such flag here")


def test_the_model_may_come_first() -> None:
    for name, more in (("serve", []), ("plan", []), ("chat", []), ("bench", []), ("eval", ["--task", "recall"])):
        assert parse(BY_NAME[name], ["abacus-mla", "--dtype", "float32", *more])[1]["model"] == "abacus-mla"
    assert "asked twice" in refused("serve", "one", "--model-path", "two")[0]
    assert "one argument too many" in refused("serve", "one", "two")[0]
    options, asked = parse(BY_NAME["generate"], ["say", "this", "--model-path", "m"])
    assert (options.prompt, asked) == (["say", "this"], {"model_path": "m"})


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["bench", "--num-prompts", "0"], "found '0', expected a number >= 1"),
        (["bench", "--request-rate", "0"], "found 0, expected a number above 0"),
        (["bench", "--request-rate", "nan"], "expected a number"),
        (["eval"], "--task"),
        (["eval", "--task", "gsm9k"], "invalid choice"),
        (["generate", "--max-tokens"], "expected one argument"),
    ],
)
def test_a_bad_value_of_an_option_is_refused(argv: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert found in err


def test_a_request_rate_may_be_infinite() -> None:
    assert parse(BY_NAME["bench"], ["--request-rate", "inf"])[0].request_rate is None
    assert parse(BY_NAME["bench"], ["--request-rate", "2.5"])[0].request_rate == 2.5


def test_commands_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generat")
    assert code == 2
    assert "there is no command 'generat'; did you mean generate?" in err
    assert run(capsys)[0] == 2


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"tessera {__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {command.name} " in out and command.help in out for command in COMMANDS)


@pytest.mark.parametrize("argv", [["--help"], *([c.name, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_is_short_to_appear(argv: list[str]) -> None:
    code = (
        "import sys, json; from tessera.cli import main\n"
        f"try: main({argv!r})\nexcept SystemExit: pass\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    wide = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=wide
    )
    out = done.stdout
    assert "usage: tessera" in out
    assert json.loads(out.splitlines()[-1]) == []
    assert len(out.splitlines()) < 250
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_help_tells_every_default_and_says_something_of_every_option(command: Command) -> None:
    form = _Form("")
    for action in _parser(command)._actions:
        text = form._expand_help(action) if action.help not in (None, argparse.SUPPRESS) else ""
        hidden = action.dest.startswith(PREFIX) and action.help == argparse.SUPPRESS
        assert text or hidden, f"{action.option_strings} says nothing"
        if action.default not in (None, False, [], argparse.SUPPRESS):
            assert text.count("Default:") == 1, (action.option_strings, text)
            assert not re.search(r"\d\.0\.$", text), (action.option_strings, text)


def test_flags_tell_their_defaults_as_people_read_them() -> None:
    for flag in FLAGS:
        if flag.group != THEIRS and flag.state is None and flag.default is not False:
            told = re.search(r"[Dd]efault:? (.+)|left out", flag.describe())
            assert told or (flag.default is None and flag.name in NOTHING), flag.name
            assert not re.search(r"[^.]\d\.0\.$|\(\)|\d{8}", flag.describe()), flag.name
    assert "Default: 0." in BY_KEY["random_seed"].describe()
    assert "Default: 32M." in BY_KEY["max_body_size"].describe()


def test_flags_of_sglang_that_set_nothing_are_not_in_the_help_but_it_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out, _ = run(capsys, "serve", "--help")
    assert "--enable-eplb" not in out
    assert "Other flags of SGLang's" in out
    (text,) = refused("serve", "--model-path", "m", "--enable-eplb")
    assert text == "--enable-eplb: not built yet. Leave it out; experts lie on the ranks in order."


def test_help_takes_less_than_half_a_second() -> None:
    """Of processor time, which does not depend on who else is at work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMMAND, "serve", "--help"], capture_output=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_flags_of_a_file_lie_under_those_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("page-sise: 3\n")
    code, _, err = run(capsys, "plan", "--config", str(file), "--model-path", "abacus-hybrid")
    assert code == 2
    assert "page-sise: there is no such flag" in err
    for text, problem in (
        ("- a\n", "not a mapping"),
        ("tp: 1\na: [\n", "flags.yaml: line 3, column 1: expected the node content, but found '<stream end>'. Give"),
        (None, "flags.yaml: No such file or directory. Give"),  # neither the system's number of it nor the path again
    ):
        file.unlink() if text is None else file.write_text(text)
        code, _, err = run(capsys, "plan", "--config", str(file))
        assert code == 2
        assert problem in err
