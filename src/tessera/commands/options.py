"""What each subcommand accepts: the engine's flags from their table, and options of its own. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.core.config import FLAGS, Flag, Notes, read, suggestion
from tessera.core.errors import ConfigError, Conflict

TASKS = ("gsm8k", "gpqa", "recall")


@dataclass(frozen=True)
class Command:
    """A subcommand. `add` adds its own options; the engine's flags come after them."""

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]


def _at_least(low: float, kind: type[int] | type[float] = int) -> Callable[[str], int | float]:
    def parse_number(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number >= {low:g}")
        return number

    return parse_number


def _choices_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=_at_least(1), default=None, help="Most tokens of an answer.")
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    parser.add_argument("--top-p", type=_at_least(0, float), default=1.0, help="Share of the likeliest tokens kept.")
    parser.add_argument("--top-k", type=int, default=-1, help="Number of the likeliest tokens kept; -1: all.")
    parser.add_argument("--seed", type=_at_least(0), default=None, help="Seed of the drawn tokens.")


def _url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="Address of a running server, instead of a model in this process.")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="The model, as --model-path.")


def _serve(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--plan", action="store_true", help="Print the resolved configuration and its bytes, and exit.")


def _plan(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument(
        "--device-memory", help="Plan for a device with this much free memory (like 80G), not this one."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="Prompts; without any, one is read from standard input.")
    parser.add_argument("--chat", action="store_true", help="Put the prompt through the model's chat template.")
    _choices_of(parser)
    _url(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--system", help="A system message.")
    _choices_of(parser)
    _url(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, required=True, help="Which questions.")
    parser.add_argument(
        "--num-questions", type=_at_least(1), default=None, help="How many; default 200, or the file's."
    )
    parser.add_argument("--parallel", type=_at_least(1), default=128, help="Most questions at a time.")
    parser.add_argument("--repeat", type=_at_least(1), default=1, help="Times that the whole set is asked.")
    parser.add_argument("--data", type=Path, help="JSON lines with question and answer, instead of the own ones.")
    parser.add_argument("--max-tokens", type=_at_least(1), default=None, help="Most tokens of an answer.")
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="Seed of the questions and of the drawn tokens.")
    parser.add_argument(
        "--min-score", type=_at_least(0, float), default=None, help="Exit with 1 below this mean score."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    _url(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=_at_least(1), default=None, help="How many requests; default 32.")
    parser.add_argument("--input-len", type=_at_least(1), default=64, help="Tokens of a random prompt.")
    parser.add_argument("--output-len", type=_at_least(1), default=64, help="Tokens of an answer.")
    parser.add_argument("--data", type=Path, help="JSON lines with prompt, instead of random tokens.")
    parser.add_argument("--request-rate", type=_at_least(1e-6, float), default=None, help="Requests/s (Poisson).")
    parser.add_argument("--concurrency", type=_at_least(1), default=None, help="Most requests at a time.")
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="Seed of prompts and arrivals.")
    parser.add_argument("--warmup", type=_at_least(0), default=1, help="Requests before the clock starts.")
    parser.add_argument("--vocab-size", type=_at_least(1), default=None, help="Range of random tokens.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    _url(parser)


COMMANDS = (
    Command("serve", "Serve a model over HTTP.", _serve),
    Command("generate", "Complete prompts.", _generate),
    Command("chat", "Talk with a model.", _chat),
    Command("bench", "Measure latency and throughput, in this process or of a server.", _bench),
    Command("eval", "Measure accuracy on questions with known answers.", _eval),
    Command("plan", "Print what a configuration resolves to and the bytes it needs.", _plan),
)


def parse(command: Command, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The command's own options, and the engine's flags that were given (a file's, then the command line's).

    Raises `ConfigError` with everything that is wrong with the flags; argparse ends the process with 2 where an option
    lacks a value.
    """
    parser = _parser(command)
    options, rest = parser.parse_known_args(argv)
    asked = {flag.name: getattr(options, flag.name) for flag in FLAGS if getattr(options, flag.name) is not None}
    if getattr(options, "model", None):
        asked["model"] = options.model
    _check(parser, rest, asked)
    return options, asked


def _check(parser: argparse.ArgumentParser, rest: Sequence[str], asked: Mapping[str, object]) -> None:
    notes = Notes()
    read(asked, notes)
    known = [s.removeprefix("--") for action in parser._actions for s in action.option_strings if s.startswith("--")]
    unknown = [word.split("=")[0] for word in rest if word.startswith("-")] or list(rest)
    wrong = [Conflict((word,), "there is no such flag here", suggestion(word, known)) for word in unknown]
    if wrong or notes.conflicts:
        raise ConfigError([*wrong, *notes.conflicts])


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tessera {command.name}", description=command.help, allow_abbrev=False, conflict_handler="error"
    )
    command.add(parser)
    parser.add_argument("--config", type=Path, help="YAML file with flags; the command line wins.")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in FLAGS:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        _add(groups[flag.group], flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text = flag.describe().replace("%", "%%")
    if flag.is_switch:
        group.add_argument(*flag.spellings, dest=flag.name, action="store_const", const=True, default=None, help=text)
    else:
        many = "+" if flag.takes_many else None
        group.add_argument(*flag.spellings, dest=flag.name, metavar="X", nargs=many, default=None, help=text)
