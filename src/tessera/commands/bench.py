"""`tessera bench`: latency and throughput, of a model in this process or of a running server."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from tessera.bench.figures import KINDS, details, figures
from tessera.bench.serving import Drive, drive
from tessera.bench.workload import Lengths, arrivals, random_asks, read_asks
from tessera.client import Ask, Client, HttpClient
from tessera.commands.clients import Session, address, session
from tessera.commands.terminal import progress, say, table, write
from tessera.core.errors import ConfigError, Conflict, TesseraError

NUM_PROMPTS = 32


def run(options: Namespace, asked: Mapping[str, object], environ: Mapping[str, str]) -> int:
    """Sends all requests and prints the figures; 1 when one has failed."""
    _check(options)
    with _appended(options.output_file) as file:
        with session(options, asked, environ) as here:
            found = here.runner.run(_measure(here, options))
        told = _setting(options) | figures(found)
        whole = told | details(found.timings) if options.output_details else told
        if file is not None:
            file.write(json.dumps(whole) + "\n")
    if options.json:
        write(json.dumps(whole, indent=2))
    else:
        _print(told)
    errors = [timing.error for timing in found.timings if timing.error is not None]
    for error in dict.fromkeys(errors):
        say(f"tessera: {errors.count(error)} request(s) failed: {error}")
    return 1 if errors else 0


@contextmanager
def _appended(path: Path | None) -> Iterator[TextIO | None]:
    """A file to append to, opened before anything is measured for it; None where none was asked."""
    try:
        file = nullcontext(None) if path is None else path.open("a", encoding="utf-8")
    except OSError as error:
        remedy = "Give a file that can be written."
        raise ConfigError([Conflict((f"--output-file {path}",), error.strerror or str(error), remedy)]) from error
    with file as opened:
        yield opened


def _check(options: Namespace) -> None:
    """Refuses options that do not go together, before anything is loaded."""
    wrong = []
    if options.dataset_name == "custom" and not options.dataset_path:
        wrong.append(Conflict(("--dataset-name custom",), "no file was named", "Give --dataset-path."))
    if options.dataset_name in ("random", "random-ids") and options.dataset_path:
        flags = (f"--dataset-name {options.dataset_name}", "--dataset-path")
        wrong.append(Conflict(flags, "random prompts need no file", "Leave one of them out."))
    if options.random_range_ratio > 1:
        wrong.append(Conflict(("--random-range-ratio",), f"found {options.random_range_ratio}", "Use 0 to 1."))
    if options.flush_cache and address(options) is None:
        wrong.append(
            Conflict(("--flush-cache",), "there is no server whose cache it means", "Give --url, or leave it out.")
        )
    if options.profile and address(options) is None:
        remedy = "Give --url, or leave it out."
        wrong.append(Conflict(("--profile",), "there is no server that could be profiled", remedy))
    if not options.profile and (options.profile_output_dir or options.profile_num_steps):
        flags = ("--profile-output-dir",) if options.profile_output_dir else ("--profile-num-steps",)
        wrong.append(Conflict(flags, "it says how to profile, and nothing is profiled", "Give --profile, too."))
    if _more(options) is None:
        found = f"found {options.extra_request_body!r}"
        wrong.append(Conflict(("--extra-request-body",), found, """Expected a JSON object, such as '{"top_k": 5}'."""))
    if wrong:
        raise ConfigError(wrong)


def _more(options: Namespace) -> dict[str, object] | None:
    """The fields of --extra-request-body; None when they cannot be read."""
    try:
        found = json.loads(options.extra_request_body or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def _measure(here: Session, options: Namespace) -> Drive:
    rng, client = random.Random(options.seed), here.client
    asks = await _asks(client, options, rng)
    first, asks = asks[: options.warmup_requests], asks[options.warmup_requests :]
    warm = await drive(client, first, arrivals(len(first), None, rng))
    if failed := [timing.error for timing in warm.timings if timing.error is not None]:
        raise TesseraError(f"the warm-up failed: {failed[0]}")
    if options.flush_cache and isinstance(client, HttpClient):
        await client.flush()
    say(f"Sending {len(asks)} requests to {here.where}.")
    times = arrivals(len(asks), options.request_rate, rng)
    async with profiled(client, options):
        with nullcontext(_silent) if options.disable_tqdm else progress("requests") as advance:
            return await drive(client, asks, times, options.max_concurrency, advance)


@asynccontextmanager
async def profiled(client: Client, options: Namespace) -> AsyncIterator[None]:
    """The server is profiled meanwhile, if that is asked."""
    if not options.profile or not isinstance(client, HttpClient):
        yield
        return
    folder, steps = options.profile_output_dir, options.profile_num_steps
    asked = {"output_dir": folder, "num_steps": steps}
    await client.start_profile({name: value for name, value in asked.items() if value is not None})
    try:
        yield
    finally:  # a server that went on would refuse the next profile
        if steps is None:  # else it ends by itself
            say(f"The profile is in {', '.join(await client.stop_profile()) or 'a folder of the server'}.")


def _silent(done: int, total: int) -> None:
    """Tells nobody."""


async def _asks(client: Client, options: Namespace, rng: random.Random) -> list[Ask]:
    """The requests of the warm-up, with prompts of their own, and those that count."""
    lengths = Lengths(options.random_input_len, options.random_output_len, options.random_range_ratio)
    like = Ask(temperature=options.temperature, ignore_eos=not options.disable_ignore_eos, more=_more(options) or {})
    if options.dataset_path:
        asks = _read(options.dataset_path, options.num_prompts, lengths, rng, like)
        return [asks[i % len(asks)] for i in range(options.warmup_requests)] + asks
    size = options.vocab_size or await client.vocab_size()
    if size is None:
        remedy = "Give --vocab-size: ids below it are drawn."
        raise ConfigError([Conflict(("random prompts",), "this server does not say how many token ids it has", remedy)])
    return random_asks((options.num_prompts or NUM_PROMPTS) + options.warmup_requests, lengths, size, rng, like)


def _read(path: Path, count: int | None, lengths: Lengths, rng: random.Random, like: Ask) -> list[Ask]:
    try:
        return read_asks(path, count, lengths, rng, like)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Conflict((f"--dataset-path {path}",), str(error), "Give a file of JSON lines.")]) from error


def _setting(options: Namespace) -> dict[str, object]:
    """What was asked, under SGLang's names."""
    return {
        "backend": "openai" if address(options) else "tessera",
        "dataset_name": "custom" if options.dataset_path else "random",
        "request_rate": options.request_rate or "inf",
        "max_concurrency": options.max_concurrency,
        "random_input_len": options.random_input_len,
        "random_output_len": options.random_output_len,
        "random_range_ratio": options.random_range_ratio,
    }


def _print(told: Mapping[str, object]) -> None:
    counts = ("completed", "failed", "duration", "total_input_tokens", "total_output_tokens")
    rates = ("request_throughput", "input_throughput", "output_throughput", "total_throughput", "concurrency")
    units = {"duration": ", s", **dict.fromkeys(rates[:-1], ", 1/s")}
    table(
        "requests", [(name.replace("_", " ") + units.get(name, ""), _shown(told[name])) for name in (*counts, *rates)]
    )
    columns = ("mean", "median", "p90", "p95", "p99", "max")
    rows = [(what, *(_shown(told[f"{c}_{kind}_ms"]) for c in columns)) for kind, what in KINDS.items()]
    table("latency, ms", rows, ("", *columns))


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
