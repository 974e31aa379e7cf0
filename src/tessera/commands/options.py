"""What each subcommand accepts: the engine's flags from their table, and options of its own. Imports nothing heavy."""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tessera.core.config import FLAGS, Flag, Notes, read, suggestion
from tessera.core.errors import ConfigError, Conflict

WIDTH = 120  # of help, where a terminal is not narrower
TASKS = ("gsm8k", "gpqa", "recall")
SERVING = "serving"  # the group of flags that concern a server's own front
POLICIES = ("round_robin", "least_loaded", "cache_aware")  # those of the router; not imported, to load nothing heavy
PLACES = ("here", "ray", "slurm")
ENDINGS = ("exit", "restart", "continue")
OTLP = "localhost:4317"  # as SGLang's
THEIRS = "sglang"  # the group of flags that are known by name only
OTHERS = (
    "Other flags of SGLang's server are known by name: each is refused with what to do instead, or does nothing and is "
    "listed at the start with the reason."
)
PREFIX = "engine_"  # of the engine's flags among the options of a command
USAGE = {
    "serve": "[MODEL] [FLAGS]",
    "plan": "[MODEL] [FLAGS]",
    "chat": "[MODEL] [FLAGS]",
    "bench": "[MODEL] [FLAGS]",
    "eval": f"[MODEL] --task {{{','.join(TASKS)}}} [FLAGS]",
    "generate": "[PROMPT ...] [FLAGS]",
    "up": "RECIPE.yaml [FLAGS]",
    "router": "--prefill URL [BOOTSTRAP_PORT] ... --decode URL ... | --worker URL ... [FLAGS]",
}


@dataclass(frozen=True)
class Command:
    """A subcommand. `add` adds its own options; the engine's flags follow, a server's only where it `serves`."""

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    serves: bool = False
    engine: bool = True  # it takes flags of the engine at all

    @property
    def flags(self) -> tuple[Flag, ...]:
        """The engine's flags that it takes."""
        return tuple(flag for flag in FLAGS if self.engine and (self.serves or flag.group != SERVING))


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


def _rate(text: str) -> float | None:
    """Requests a second; None for "inf", all at once."""
    rate = None if text == "inf" else _at_least(0, float)(text)
    if rate == 0:
        raise argparse.ArgumentTypeError("found 0, expected a number above 0")
    return rate


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=_at_least(1), help="Most tokens of an answer.")
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    parser.add_argument("--top-p", type=_at_least(0, float), default=1.0, help="Share of the likeliest tokens kept.")
    parser.add_argument("--top-k", type=int, default=-1, help="Number of the likeliest tokens kept; -1: all.")
    parser.add_argument("--seed", type=_at_least(0), help="Seed of the drawn tokens.")


def _server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a running server, instead of a model in this process")
    group.add_argument("--url", "--base-url", metavar="URL", help="Its address; --model-path then names a model of it.")
    group.add_argument("--host", help="Its host; the same as --url http://HOST:PORT.")
    group.add_argument("--port", type=_at_least(1), help="Its port; default 30000.")
    group.add_argument("--api-key", dest="key", metavar="KEY", help="The key that it asks for.")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="The model, as --model-path.")


def _serve(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--plan", action="store_true", help="Print the resolved configuration and its bytes, and exit.")


def _plan(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--device-memory", help="Plan for devices with this much free memory (like 80G), not for here.")
    parser.add_argument("--num-devices", type=_at_least(1), default=8, help="How many of them a host has.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="Prompts; without any, one is read from standard input.")
    parser.add_argument("--file", type=Path, help="Prompts, one a line; of .jsonl the field `prompt` of each line.")
    parser.add_argument("--chat", action="store_true", help="Put each prompt through the model's chat template.")
    parser.add_argument("--stop", action="append", default=[], help="Text that ends an answer; may be given again.")
    parser.add_argument("--ignore-eos", action="store_true", help="Go on after the end-of-text token.")
    parser.add_argument("--json", action="store_true", help="Print a JSON object for each prompt.")
    _sampling(parser)
    _server(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--system", help="A system message.")
    _sampling(parser)
    _server(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("--task", "--eval-name", choices=TASKS, required=True, help="Which questions: of GSM8K's or of "
        "GPQA's form, made here by a seeded generator (their own: --data), or codes to recall.")  # fmt: skip
    parser.add_argument("--num-questions", "--num-examples", type=_at_least(1),
                        help="How many; default 200, or all of the file.")  # fmt: skip
    parser.add_argument("--parallel", "--num-threads", type=_at_least(1), default=128, help="Most questions at a time.")
    parser.add_argument("--repeat", type=_at_least(1), default=1, help="Times that the whole set is asked.")
    parser.add_argument(
        "--data", "--data-path", type=Path, help="Ask these instead: JSON lines with question and answer."
    )
    parser.add_argument(
        "--max-tokens", "--max-new-tokens", type=_at_least(1), help="Most tokens of an answer; default: the task's."
    )
    parser.add_argument("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    parser.add_argument("--seed", type=_at_least(0), default=0, help="Seed of the questions and of the drawn tokens.")
    parser.add_argument("--min-score", type=_at_least(0, float), help="Exit with 1 below this mean score.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--output-details", action="store_true", help="Put every answer into the JSON.")
    _server(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    add = parser.add_argument
    add("--num-prompts", type=_at_least(1), help="How many requests; default 32, or all of the file.")
    add("--random-input-len", "--input-len", type=_at_least(1), default=64, help="Most tokens of a random prompt.")
    add("--random-output-len", "--output-len", type=_at_least(1), default=64, help="Most tokens of an answer.")
    add("--random-range-ratio", type=_at_least(0, float), default=1.0, help="Shortest length as a share of the most.")
    add("--dataset-name", choices=("random", "random-ids", "custom"), help="Default: random token ids.")
    add("--dataset-path", "--data", type=Path, help="JSON lines with prompt or messages, and perhaps output_len.")
    add("--request-rate", type=_rate, help="Requests a second (Poisson); inf, the default: all at once.")
    add("--max-concurrency", "--concurrency", type=_at_least(1), help="Most requests at a time.")
    add("--temperature", type=_at_least(0, float), default=0.0, help="0: the likeliest token always.")
    add("--disable-ignore-eos", action="store_true", help="Let answers end by themselves.")
    add("--extra-request-body", metavar="JSON", help="Further fields of each request.")
    add("--seed", type=_at_least(0), default=1, help="Seed of prompts and arrivals.")
    add("--warmup-requests", "--warmup", type=_at_least(0), default=1, help="Requests before the clock starts.")
    add("--flush-cache", action="store_true", help="Empty the server's prefix cache first.")
    add("--profile", action="store_true", help="Profile the server while the requests run.")
    add("--profile-output-dir", metavar="DIR", help="Folder of the traces; default: the server's.")
    add("--profile-num-steps", type=_at_least(1), help="Steps of the profile; default: until the last answer.")
    add("--vocab-size", type=_at_least(1), help="Range of random token ids; default: the model's.")
    add("--output-file", type=Path, help="Append the figures to this file, a JSON object a line.")
    add("--output-details", action="store_true", help="Put every request into the JSON.")
    add("--disable-tqdm", action="store_true", help="No progress bar.")
    add("--json", action="store_true", help="Print JSON.")
    _server(parser)


def _router(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("servers").add_argument
    add("--prefill", action="append", nargs="+", default=[], metavar=("URL", "PORT"),
        help="A prefill server, and its bootstrap port; else the server tells it. Again for more.")  # fmt: skip
    add("--decode", action="append", default=[], metavar="URL", help="A decode server. May be given again.")
    add("--worker", "--worker-urls", action="append", nargs="+", default=[], metavar="URL",
        help="Servers that do both, instead of pairs. May be given again.")  # fmt: skip
    add = parser.add_argument_group("routing").add_argument
    add("--policy", choices=POLICIES, default="cache_aware", help="Who gets a request. Default: cache_aware, which "
        "for decode servers is least_loaded: they compute no prompts.")  # fmt: skip
    add("--prefill-policy", choices=POLICIES, help="Another policy for prefill servers.")
    add("--decode-policy", choices=POLICIES, help="Another policy for decode servers.")
    add("--request-timeout-secs", type=_at_least(0.001, float), default=1800.0,
        help="Seconds that a server may be silent on a request.")  # fmt: skip
    add("--cb-failure-threshold", type=_at_least(1), default=3, help="Faults in a row that take a server down.")
    add("--health-check-interval-secs", type=_at_least(0.001, float), default=5.0, help="Seconds between probes.")
    add("--health-check-timeout-secs", type=_at_least(0.001, float), default=5.0, help="Seconds that a probe may take.")
    add = parser.add_argument_group("serving").add_argument
    add("--host", default="127.0.0.1", help="Address to listen on.")
    add("--port", type=_at_least(0), default=30000, help="Port to listen on; 0: any free one.")
    add("--api-key", help="Key that clients must send, and that servers are sent; without it the clients' own go on.")
    add("--drain-timeout", type=_at_least(0, float), default=30.0, help="Seconds for running requests after SIGTERM.")
    add("--max-body-size", default="32M", help="Largest request body, bytes (or like 64M).")
    add("--log-level", choices=("debug", "info", "warning", "error", "critical"), default="info",
        help="What is logged.")  # fmt: skip
    add(
        "--log-requests",
        action="store_true",
        help="Log every request with its trace id, but for polls (/health, /metrics).",
    )
    _trace(parser)


def _trace(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("tracing").add_argument
    add("--enable-trace", action="store_true", help="Record spans with OpenTelemetry.")
    add("--otlp-traces-endpoint", default=OTLP, help=f"Collector: HOST:PORT (gRPC) or a URL (HTTP). Default: {OTLP}.")


def _up(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", type=Path, help="The recipe's YAML file.")
    add("--set", action="append", default=[], metavar="ROLE.KEY=VALUE", dest="changes",
        help="Change a flag of a role (or of '*', router, resources); an empty value removes it.")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), help="The same as --set '*.device=...'.")
    add("--plan", action="store_true", help="Print what becomes of every key, and start nothing; needs no GPU.")
    add("--json", action="store_true", help="With --plan: print JSON.")
    add("--on", choices=PLACES, default="here", help="here: processes of this host. ray: a Ray cluster. slurm: write "
        "a job file, and start nothing. Default: here.")  # fmt: skip
    add("--job-dir", type=Path, help="Folder for --on slurm. Default: job.")
    add("--host", help="Address that the router listens on. Default: the recipe's, else 127.0.0.1.")
    add("--port", type=_at_least(0), help="Port of the router. Default: the recipe's, else 30000; 0: any free one.")
    add("--on-failure", choices=ENDINGS, default="exit", help="What follows when a worker ends by itself: all end "
        "(exit), it is started anew (restart), or the others go on without it (continue). Default: exit.")  # fmt: skip
    add("--max-restarts", type=_at_least(1), default=3, help="Most restarts within 10 minutes; one more ends all.")
    add("--start-timeout", type=_at_least(0.1, float), default=1800.0, help="Seconds until all must be ready.")
    add("--log-dir", type=Path, help="Folder to keep each process' lines in as well.")


ROUTER = Command("router", "Put one address before several servers.", _router, engine=False)
COMMANDS = (
    Command("serve", "Serve a model over HTTP.", _serve, serves=True),
    ROUTER,
    Command("up", "Bring up the workers and the router of a recipe.", _up, engine=False),
    Command("generate", "Complete prompts.", _generate),
    Command("chat", "Talk with a model.", _chat),
    Command("bench", "Measure latency and throughput, in this process or of a server.", _bench),
    Command("eval", "Measure accuracy on questions with known answers.", _eval),
    Command("plan", "Print what a configuration resolves to and the bytes it needs.", _plan, serves=True),
)


def parse(command: Command, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The command's own options, and the engine's flags that were given.

    Raises `ConfigError` with everything that is wrong with the flags; argparse ends the process with 2 where an option
    lacks a value.
    """
    options, asked, wrong = parsed(command, argv)
    if wrong:
        raise ConfigError(wrong)
    return options, asked


def parsed(command: Command, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object], list[Conflict]]:
    """The same, with what is wrong as the last."""
    parser = _parser(command)
    options, rest = parser.parse_known_args(argv)
    given = {flag.name: getattr(options, PREFIX + flag.name) for flag in command.flags}
    asked = {name: value for name, value in given.items() if value is not None}
    word = getattr(options, "model", None)
    strayed = "model_path" in asked and any((flag, word) in itertools.pairwise(argv) for flag in rest)
    if word and not strayed:  # behind an unknown flag it was meant as that one's value
        asked["model"] = word
    return options, asked, _wrong(parser, rest, asked)


class _Form(argparse.HelpFormatter):
    """Help that says the value of an option once, after its last spelling, and N for a number."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
        super().__init__(prog, max_help_position=min(36, width // 3), width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Tells the default, where the help does not."""
        text = action.help
        if text in (None, argparse.SUPPRESS) or action.default in (None, False, [], argparse.SUPPRESS):
            return text
        told = f"Default: {action.default:g}" if isinstance(action.default, float) else f"Default: {action.default}"
        return text if told in str(text) else f"{text} {told}."

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "FILE" if action.type is Path else "N" if action.type else "X"


def _wrong(parser: argparse.ArgumentParser, rest: Sequence[str], asked: Mapping[str, object]) -> list[Conflict]:
    notes = Notes()
    read(asked, notes)
    known = [s.removeprefix("--") for action in parser._actions for s in action.option_strings if s.startswith("--")]
    unknown = [word.split("=")[0] for word in rest if word.startswith("-")]
    wrong = [Conflict((word,), "there is no such flag here", suggestion(word, known, parser.prog)) for word in unknown]
    if rest and not wrong:
        wrong = [Conflict((word,), "one argument too many", "Put a text with spaces into quotes.") for word in rest]
    return [*wrong, *notes.conflicts]


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tessera {command.name}",
        usage=f"tessera {command.name} {USAGE.get(command.name, '[FLAGS]')}",
        description=command.help,
        allow_abbrev=False,
        epilog=OTHERS if command.engine else None,
        formatter_class=_Form,
    )
    command.add(parser)
    if command.engine:
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with flags; the command line wins.")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in command.flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(None if flag.group == THEIRS else flag.group)
        _add(groups[flag.group], flag)
    return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    dest = PREFIX + flag.name
    text = argparse.SUPPRESS if flag.group == THEIRS else flag.describe().replace("%", "%%")
    if flag.is_switch:
        group.add_argument(*flag.spellings, dest=dest, action="store_const", const=True, help=text)
    else:
        many = "+" if flag.takes_many else None
        group.add_argument(*flag.spellings, dest=dest, metavar="X", nargs=many, help=text)
