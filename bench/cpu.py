"""Tessera against `transformers` on this CPU, side by side in one run: `python bench/cpu.py [--json]`.

A random model of Qwen3-0.6B's shape in bfloat16, greedy, all requests at once, all engines on the same prompts, turn
about, the best of several rounds each. `tokens/s`: output tokens over the time from the first request to the last
token. `decode`: the same from the moment on at which every request has its first token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from cpu_engines import Continuous, Generate
from ours import Measured, Ours

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
}
AIMS = {1: 1.6, 8: 2.0, 32: 3.0}
"""Requests at once -> how many times the best mode of `transformers` is asked of us."""

Engine = Callable[[list[list[int]], int], Measured]


@dataclass(frozen=True, slots=True)
class Best:
    """The best round of an engine. `tokens_per_s` and `decode_per_s` each of its own best round."""

    engine: str
    requests: int
    tokens_per_s: float
    decode_per_s: float
    same_first_tokens: float  # share of requests whose first token is that of `transformers` generate


def make_model(folder: Path, seed: int = 0) -> None:
    """Writes config.json and random safetensors of `SHAPE` into `folder`, as `transformers` does."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


@contextlib.contextmanager
def model_folder(given: Path | None) -> Iterator[Path]:
    """The folder of the model: the given one, filled if it is empty; else a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = given or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessera-bench-")))
        if not (folder / "config.json").is_file():
            make_model(folder)
        yield folder


def measure(engines: dict[str, Engine], requests: int, lengths: tuple[int, int], rounds: int) -> list[Best]:
    """Each engine's best of `rounds` rounds with fresh prompts, after one round to warm up."""
    rng = random.Random(requests)
    runs: dict[str, list[Measured]] = {name: [] for name in engines}
    same: dict[str, list[bool]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        prompts = [[rng.randrange(SHAPE["vocab_size"]) for _ in range(lengths[0])] for _ in range(requests)]
        found = {name: run(prompts, lengths[1]) for name, run in engines.items()}
        expected = [tokens[0] for tokens in found["generate"].tokens]
        for name, measured in found.items():
            if turn:
                runs[name].append(measured)
            same[name] += [tokens[0] == first for tokens, first in zip(measured.tokens, expected, strict=True)]
    return [
        Best(
            name,
            requests,
            max(m.tokens_per_s for m in of_engine),
            max(m.decode_per_s for m in of_engine),
            sum(same[name]) / len(same[name]),
        )
        for name, of_engine in runs.items()
    ]


def conditions() -> dict[str, object]:
    """What the figures depend on besides the code."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def table(results: Sequence[Best]) -> str:
    """The results, with ours as multiples of the best mode of `transformers`."""
    lines = [f"{'requests':>8}  {'engine':<12} {'tokens/s':>9} {'decode':>8} {'same first':>11}  {'x best':>6}  aim"]
    for r in results:
        theirs = [o.tokens_per_s for o in results if o.requests == r.requests and o.engine != "tessera"]
        ours = r.engine == "tessera" and theirs
        against = f"{r.tokens_per_s / max(theirs):6.2f}  {AIMS.get(r.requests, '')}" if ours else ""
        lines.append(
            f"{r.requests:>8}  {r.engine:<12} {r.tokens_per_s:9.1f} {r.decode_per_s:8.1f} {r.same_first_tokens:11.0%}  "
            f"{against}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description="Tessera against transformers on this CPU.")
    parser.add_argument("--requests", type=int, nargs="+", default=list(AIMS), help="how many at once")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-path", type=Path, help="folder of the model, made there if it is empty")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    before = conditions()
    results = []
    with (
        model_folder(args.model_path) as folder,
        Ours({"model_path": str(folder), "device": "cpu", "dtype": "bfloat16"}) as ours,
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        engines: dict[str, Engine] = {"generate": Generate(model), "continuous": Continuous(model), "tessera": ours}
        for requests in args.requests:
            results += measure(engines, requests, (args.input_len, args.output_len), args.rounds)
            if not args.json:
                print(table(results[-len(engines) :]), flush=True)
    if args.json:
        print(json.dumps({"before": before, "after": conditions(), "results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    main()
