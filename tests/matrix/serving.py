"""One point of the matrix: served, and compared with one rank; or refused, by the flags that it should name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from assets import abacus
from matrix.points import Point, refusals
from matrix.results import AGAIN
from tessera.core.errors import ConfigError
from tessera.core.families import read_spec
from tessera.core.mesh import SINGLE
from tessera.core.messages import SamplingParams, StepReport, Submit, TokenLogprobs
from tessera.core.weights import weight_table
from tessera.models.folder import find_model
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tiny import Answer, Run, TinyModel, resolved, serve

Way = Literal["threads", "short", "gloo"]  # ranks as threads, with short prompts and answers, or as processes
TOLERANCE = 1e-4  # of teacher-forced logprobs in float32
RANDOM = "random-gqa"
GQA: dict[str, Any] = {  # KV heads fewer than ranks, a vocabulary that is padded, a dense layer beside those of experts
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}
BASE: dict[str, Any] = {"page_size": 16, "max_total_tokens": 2048, "max_running_requests": 12}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24, logprobs=0)
SCORED = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
# DP rank that each request asks for (as far as there are so many), and the outputs that have come before it arrives:
# rank 0 and 2 decode when 1 and 0 get long prompts and 3 has nothing to do; short ones come while others prefill.
WHERE, WHEN = (0, 2, 1, 0, 3, 1, 0), (0, 0, 4, 4, 10, 12, 12)
LENGTHS = (9, 17, 61, 40, 1, 5, 33)  # of random prompts
CUT = "abort"  # how a request ends when the time for all is over: nobody aborts one here
SHORT, FEW = 12, 4  # tokens of a prompt and of an answer, where lengths shall be short


@dataclass
class Verdict:
    """What came of a point. `worst`: the largest difference of a logprob. `together`: kinds of parts in one step."""

    outcome: str  # one of `OUTCOMES`
    worst: float = 0.0
    why: str = ""
    together: set[frozenset[str]] = field(default_factory=set)


@cache
def model_of(name: str) -> TinyModel:
    """A packaged model, or the random one."""
    if name != RANDOM:
        return abacus.model(name)
    spec = read_spec(GQA)
    return TinyModel(spec, Noise(stored_shapes(weight_table(spec, SINGLE)), spec.zero_centred, 3))


@cache
def prompts(name: str, short: bool) -> list[list[int]]:
    """One for each request."""
    if name == RANDOM:
        draw = np.random.default_rng(5)
        found = [draw.integers(2, 97, length).tolist() for length in LENGTHS]
    else:
        asked = [q for task in ("recall", "gsm8k") for q in abacus.questions(task, len(LENGTHS))]
        found = [abacus.prompt(name, question) for question in asked[::2][: len(LENGTHS)]]
    # The beginning: on an end without it the trained models are so unsure that float32 is 2e-4 off (float64: 1e-13).
    return [tokens[:SHORT] for tokens in found] if short else found


def requests(name: str, short: bool, num_dp: int) -> list[Submit]:
    """Greedy answers with the logprob of each token, and one prompt that is scored only."""
    few = SamplingParams(temperature=0.0, max_new_tokens=FEW, logprobs=0)
    params = [few if short else GREEDY] * (len(LENGTHS) - 1) + [SCORED]
    asked = zip(prompts(name, short), params, WHERE, strict=True)
    return [Submit(f"r{i}", tokens, how, dp_rank=min(at, num_dp - 1)) for i, (tokens, how, at) in enumerate(asked)]


@cache
def alone(name: str, dtype: str, short: bool) -> Run:
    """What one rank answers, one request after the other. TimeoutError when time ran out."""
    plain = {"disable_overlap_schedule": True, "disable_radix_cache": True}
    run = serve(model_of(name), requests(name, short, 1), together=False, dtype=dtype, **BASE, **plain)
    if any(answer.finish == CUT for answer in run.answers.values()):
        raise TimeoutError(f"one rank's answers of {name} in {dtype} took too long")
    return run


def judge(point: Point, way: Way = "threads") -> Verdict:
    """Resolves a point, and serves it if it is to be served. What is wrong counts before what came late."""
    expected = refusals(point)
    try:
        resolved(model_of(point.model).spec, **BASE, **point.flags())
    except ConfigError as error:
        return _refused([str(conflict) for conflict in error.conflicts], expected)
    if expected:
        return Verdict("failed", why=f"it was not refused; expected: {expected}")
    dtypes = ("float64", "float32") if point.model == RANDOM else ("float32",)
    verdicts = [_served(point, dtype, way) for dtype in dtypes]
    return next((v for bad in AGAIN for v in verdicts if v.outcome == bad), verdicts[-1])


def _refused(found: Sequence[str], expected: Sequence[tuple[str, str]]) -> Verdict:
    missing = [flags for flags in expected if not any(all(f in text for f in flags) for text in found)]
    if missing or not expected:
        return Verdict("failed", why=f"refused with {found}; expected: {missing or 'to be served'}")
    return Verdict("refused")


def _served(point: Point, dtype: str, way: Way) -> Verdict:
    short, flags = way == "short", {**BASE, **point.flags()}
    if way == "gloo":
        flags |= {"collectives": "gloo", "model_path": str(find_model(point.model))}
    one = alone(point.model, dtype, short)
    asked = requests(point.model, short, point.dp)
    run = serve(model_of(point.model), asked, arrivals=WHEN, dtype=dtype, **flags)
    together = kinds(run.reports)
    found = {key: run.answers.get(key, Answer()) for key in one.answers}
    if wrong := [key for key, answer in one.answers.items() if not _alike(found[key], answer)]:
        return Verdict("failed", why=f"in {dtype} other tokens than one rank's: {wrong}", together=together)
    if late := [key for key, answer in found.items() if answer.finish == CUT]:
        return Verdict("late", why=f"in {dtype} time ran out for {late}", together=together)
    worst = max(
        _apart(one.answers[key].logprobs, answer.logprobs, one.answers[key].prompt_logprobs, answer.prompt_logprobs)
        for key, answer in run.answers.items()
    )
    if not worst <= TOLERANCE:
        return Verdict("failed", worst, f"in {dtype} a logprob is {worst:.2e} off", together)
    return Verdict("passed", worst, together=together)


def _alike(found: Answer, one: Answer) -> bool:
    """The same tokens and the same end; of one for which time ran out the same beginning."""
    if found.finish == CUT:
        return found.tokens == one.tokens[: len(found.tokens)]
    return (found.tokens, found.finish) == (one.tokens, one.finish)


def _apart(*entries: list[TokenLogprobs] | None) -> float:
    """The largest difference of logprobs; infinite where one side has others."""
    drawn, also, prompt, other = [[e.logprob for e in one or []] for one in entries]
    pairs = [*zip(drawn, also, strict=False), *zip(prompt, other, strict=False)]
    if (len(drawn), len(prompt)) != (len(also), len(other)) or any((a is None) != (b is None) for a, b in pairs):
        return math.inf
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)


def kinds(reports: Sequence[StepReport]) -> set[frozenset[str]]:
    """What the DP ranks did side by side, step by step."""
    steps: dict[int, set[str]] = defaultdict(set)
    for report in reports:
        if report.seconds:
            steps[report.index].add(report.label)
    return {frozenset(labels) for labels in steps.values()}
