"""Tiny random models of three architectures, and an engine around one, for tests of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.core.config import Hardware, Resolved, resolve
from tessera.core.config.kernels import LIBRARIES
from tessera.core.families import read_spec
from tessera.core.messages import Outbound, Output, Outputs, StepReport, Stop, Submit, TokenLogprobs
from tessera.core.spec import ModelSpec
from tessera.core.weights import weight_table
from tessera.models.load import stored_shapes
from tessera.models.noise import Noise
from tessera.models.source import Source
from tessera.plan.step import Step, StepDone
from tessera.run.core import EngineCore

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}

HYBRID = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 1,
}

PATIENCE_S = {"cpu": 60.0, "cuda": 300.0}  # for what runs after the last request came: a device compiles kernels first
TINY = {"qwen3": QWEN3, "hybrid": HYBRID, "mla": MLA}

FLAGS: dict[str, Any] = {
    "model_path": "tiny",
    "device": "cpu",
    "max_running_requests": 16,
    "page_size": 4,
    "max_total_tokens": 2048,
    "debug_checks": True,
}
COLLECTIVES = {"cpu": "threads", "cuda": "nccl"}  # what ranks of a test talk by, unless a test says otherwise


@dataclass(frozen=True)
class TinyModel:
    """A model to serve: what it is and where its weights come from."""

    spec: ModelSpec
    source: Source


def tiny_model(name: str, seed: int = 0) -> TinyModel:
    """One of `TINY` with random weights."""
    spec = read_spec(TINY[name])
    shapes = stored_shapes(weight_table(spec, resolved(spec).config.mesh.mesh))
    return TinyModel(spec, Noise(shapes, spec.zero_centred, seed))


def resolved(spec: ModelSpec, **flags: Any) -> Resolved:
    """The configuration of a test engine."""
    asked = {**FLAGS, **flags}
    asked.setdefault("collectives", COLLECTIVES[asked["device"]])
    capability = (9, 0) if asked["device"] == "cuda" else None
    return resolve(asked, spec, Hardware(asked["device"], 1 << 31, capability=capability, libraries=tuple(LIBRARIES)))


@dataclass
class Answer:
    """What came out for one choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: str | None = None
    num_cached: int = 0


@dataclass
class Run:
    """All that an engine said."""

    answers: dict[tuple[str, int], Answer] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    others: list[Outbound] = field(default_factory=list)
    most_in_flight: int = 0
    num_outputs: int = 0
    halved: set[int] = field(default_factory=set)  # indices of steps that ran as two halves
    num_overshoot: int = 0  # tokens drawn past the end of their sequence

    def ends(self) -> dict[tuple[str, int], tuple[list[int], str | None]]:
        """Tokens and finish reason by request and choice."""
        return {key: (answer.tokens, answer.finish) for key, answer in self.answers.items()}

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        """Tokens by request and choice."""
        return {key: answer.tokens for key, answer in self.answers.items()}

    def note(self, output: Output) -> None:
        """Adds an output to its answer."""
        answer = self.answers.setdefault((output.request_id, output.choice), Answer())
        assert answer.finish is None, f"{output} after the end"
        assert output.finish != "error", output.error
        answer.tokens += output.tokens
        answer.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert answer.prompt_logprobs is None, "prompt logprobs twice"
            answer.prompt_logprobs = output.prompt_logprobs
        answer.finish, answer.num_cached = output.finish, output.num_cached


def serve(
    model: TinyModel,
    requests: Sequence[Submit],
    together: bool = True,
    also: Callable[[EngineCore, Output], None] | None = None,
    arrivals: Sequence[int] = (),
    **flags: Any,
) -> Run:
    """Runs an engine over requests, all at once or one after the other, with every check. `also`: sees outputs.

    `arrivals`: each comes when so many outputs have come, or when there is nothing else to wait for.
    """
    run, waiting = Run(), list(requests)
    together = together and not arrivals

    def sink(message: Outbound) -> None:
        if isinstance(message, StepReport):
            run.reports.append(message)
        elif not isinstance(message, Outputs):
            run.others.append(message)
            return
        else:
            for output in message.items:
                run.note(output)
                run.num_outputs += 1
                if also is not None:
                    also(core, output)
        _go_on()

    def _go_on() -> None:
        while waiting and (together or _due() or _nothing_open()):
            posted.add(waiting[0].request_id)
            core.post(waiting.pop(0))
        if not waiting:
            core.post(Stop(PATIENCE_S[core.resolved.config.mesh.device]))

    def _due() -> bool:
        return bool(arrivals) and run.num_outputs >= arrivals[len(posted)]

    def _nothing_open() -> bool:
        open_ones = any(answer.finish is None for answer in run.answers.values())
        return not open_ones and not posted - {request_id for request_id, _ in run.answers}

    posted: set[str] = set()
    core = EngineCore(resolved(model.spec, **flags), model.spec, model.source, sink)
    _watch(core, run)
    _go_on()
    core.run()
    if core.resolved.config.logging.checks:
        core.planner.check()
    fatal = [m for m in run.others if type(m).__name__ == "Fatal"]
    assert not fatal, fatal
    return run


def _watch(core: EngineCore, run: Run) -> None:
    """Notes what passes between the loop, the runner and the planner."""
    launch, collect = core.runner.launch, core.runner.collect
    in_flight: set[int] = set()

    def launched(step: Step) -> Any:
        if len(step.halves) > 1:
            run.halved.add(step.index)
        in_flight.add(step.index)
        run.most_in_flight = max(run.most_in_flight, len(in_flight))
        return launch(step)

    def collected(ticket: Any) -> tuple[StepDone, list[Output]]:
        done, outputs = collect(ticket)
        in_flight.remove(done.index)
        run.num_overshoot += sum(int((part.tokens < 0).sum()) for part in done.parts)
        return done, outputs

    core.runner.launch, core.runner.collect = launched, collected  # type: ignore[method-assign]


def all_free(core: EngineCore) -> bool:
    """No page is held but by the prefix cache, no slot, no row."""
    states = [rank.state for rank in core.planner.ranks]
    return all(
        s.pages.num_used == s.pages.num_idle and not s.slots.num_used and not s.table.num_running for s in states
    )


def device_of(core: EngineCore) -> torch.device:
    """Where the engine runs."""
    return core.runner.pools.device
