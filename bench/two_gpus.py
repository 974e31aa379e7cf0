"""Two GPUs against one: the trained models' answers on several meshes, and the throughput of seed 1's own line.

    python bench/two_gpus.py answers      # bfloat16, NCCL: share of questions with the text of one GPU, by mesh
    python bench/two_gpus.py seed1        # DP attention with mixed chunks on the shape of DeepSeek-V2-Lite

Prints a line of JSON for each measurement; the results kept in `bench/results/gpu2.md` were taken so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from typing import Any

import torch

from gpu import SHAPES, Workload, prompts
from ours import Ours
from tessera.core.messages import StepReport
from tessera.evals.tasks import TASKS
from tessera.serve.engine import Engine

MODELS = ("abacus-hybrid", "abacus-mla")
GREEDY = {"temperature": 0, "max_new_tokens": 96}
DP = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
MESHES: dict[str, dict[str, Any]] = {
    "one, chunk 64, mixed": {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
    "one, no graphs": {"disable_cuda_graph": True},
    "one, one at a time": {"max_running_requests": 1},
    "one, eight at a time": {"max_running_requests": 8},
    "tp 2": {"tp_size": 2},
    "tp 2, ep 2": {"tp_size": 2, "ep_size": 2},
    "dp 2, mixed": {**DP, "enable_mixed_chunk": True, "chunked_prefill_size": 256},
    "dp 2, ep 2, all-to-all, dp-lm-head, dense tp 1": {
        **DP, "ep_size": 2, "moe_a2a_backend": "all_to_all", "enable_dp_lm_head": True, "moe_dense_tp_size": 1
    },
    "dp 2, mixed, two-batch overlap": {
        **DP, "enable_mixed_chunk": True, "chunked_prefill_size": 64, "enable_two_batch_overlap": True,
        "tbo_min_tokens": 2,
    },
    "dp 2, ep 2, all-to-all, two-batch overlap": {
        **DP, "ep_size": 2, "moe_a2a_backend": "all_to_all", "enable_mixed_chunk": True, "chunked_prefill_size": 64,
        "enable_two_batch_overlap": True, "tbo_min_tokens": 2,
    },
    "dp 2, ep 2, all-to-all, counted": {
        **DP, "ep_size": 2, "moe_a2a_backend": "all_to_all", "moe_a2a_padded_tokens": 8,
    },
    "dp 2, NCCL alone": {**DP, "disable_custom_all_reduce": True},
}  # fmt: skip
SEED1 = {
    **DP, "enable_mixed_chunk": True, "chunked_prefill_size": 256, "max_running_requests": 64,
    "load_format": "dummy", "skip_tokenizer_init": True, "context_length": 2048, "log_level": "warning",
    "disable_radix_cache": True,
}  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no graphs": {"disable_cuda_graph": True},
    "ep 2": {"ep_size": 2},
    "ep 2, all-to-all": {"ep_size": 2, "moe_a2a_backend": "all_to_all"},
    "NCCL alone": {"disable_custom_all_reduce": True},
}


def say(**fields: object) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def questions(num: int) -> list[str]:
    """Held-out questions of every task."""
    return [q.prompt for task in TASKS.values() for q in task.questions("heldout", num)]


def answered(model: str, num: int, flags: dict[str, Any]) -> tuple[list[str], list[list[float]], float]:
    """Texts, the logprobs of their tokens, and seconds."""
    with Engine(model, log_level="warning", dtype="bfloat16", device="cuda", **flags) as engine:
        ids = [engine.conversation([{"role": "user", "content": text}]) for text in questions(num)]
        began = time.perf_counter()
        found = engine.generate(input_ids=ids, sampling_params=GREEDY, return_logprob=True)
        seconds = time.perf_counter() - began
    logprobs = [[entry[0] for entry in a["meta_info"]["output_token_logprobs"]] for a in found]
    return [a["text"] for a in found], logprobs, seconds


def answers(num: int, meshes: list[str], models: list[str], more: dict[str, Any]) -> None:
    """Every mesh against one GPU, `more` flags on both sides."""
    for model in models:
        texts, logprobs, _ = answered(model, num, more)
        for mesh in meshes:
            try:
                found, theirs, seconds = answered(model, num, {**more, **MESHES[mesh]})
            except Exception as error:  # one mesh that fails must not cost the others on a lent machine
                say(model=model, mesh=mesh, error=f"{type(error).__name__}: {error}")
                continue
            same = [a == b for a, b in zip(texts, found, strict=True)]
            apart = [
                abs(x - y)
                for mine, other, equal in zip(logprobs, theirs, same, strict=True)
                for x, y in zip(mine, other, strict=False)
                if equal
            ]
            mean = sum(apart) / max(len(apart), 1)
            share = sum(same) / len(same)
            say(model=model, mesh=mesh, questions=len(same), same=share, mean=mean, most=max(apart), seconds=seconds)


def seed1(num: int, flags: dict[str, Any], name: str, turns: int) -> None:
    """200 requests of 512 tokens in and 128 out, 128 at a time."""
    began = time.perf_counter()
    with Ours({"model_path": str(SHAPES / "dsv2lite"), "device": "cuda", **flags}) as ours:
        ready = time.perf_counter() - began
        for turn in range(turns):
            measured = ours(prompts(Workload("seed1", num, 512, 128), ours.core.spec.vocab_size, turn), 128)
            seconds = max(t[-1] for t in measured.times)
            steps = {label: kind(ours.steps, label) for label in ("EXTEND", "MIXED", "DECODE")}
            say(name=name, ready_s=ready, turn=turn, tokens_per_s=num * 128 / seconds, seconds=seconds, steps=steps)


def kind(steps: list[StepReport], label: str) -> dict[str, float]:
    """Of the steps of a kind, by the busiest rank's label: how many, their median, and all together."""
    taken = [step.seconds for step in steps if step.busiest and step.label == label]
    return {"steps": len(taken), "median_ms": statistics.median(taken) * 1e3 if taken else 0.0, "s": sum(taken)}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["answers", "seed1"])
    parser.add_argument("--num-questions", type=int, default=60)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--turns", type=int, default=3, help="Of seed 1's line; the first compiles and records.")
    parser.add_argument("--flags", type=json.loads, default={}, help="Further flags of the engine, as JSON.")
    args = parser.parse_args()
    if args.what == "answers":
        answers(args.num_questions, args.meshes, args.models, args.flags)
        return
    for name in args.lines:
        seed1(200, {**SEED1, **LINES[name], **args.flags}, name, args.turns)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
