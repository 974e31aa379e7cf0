"""What travels between the front (HTTP, text), the planner and the ranks. msgspec: a type is schema and codec at once.

Front -> engine: `Submit`, `Abort`, `Flush`, `Stop`, `Profile`, `EndProfile`. Engine -> front: `Outputs`, `StepReport`,
`Profiled`, `Ready`, `Tick`, `Fatal`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
Fault = Literal["request", "busy", "engine"]  # of an error: the request's own, no room for it now, or the engine's


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens of one request are drawn. Limits are checked where requests enter (`serve/schema.py`).

    The noise is a pure function of (seed, position, token id), so batching, preemption and hand-over keep the tokens.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = -1  # -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # choice i of a request draws with `choice_seed(seed, i)`
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # -1: none; k >= 0: the token's own and the k likeliest
    prompt_logprobs: int = -1  # the same for prompt positions
    logprob_start: int = 0  # first prompt position whose logprob is wanted
    token_ids_logprob: tuple[int, ...] = ()  # further tokens whose logprob is wanted at each position


class Address(msgspec.Struct, frozen=True):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Submit(msgspec.Struct, tag=True, frozen=True):
    """A new request. `n` choices share the prompt; they are forked when it is computed."""

    request_id: str
    tokens: list[int]
    params: SamplingParams = SamplingParams()
    n: int = 1
    priority: int = 0  # larger goes first
    namespace: str = ""  # keys of the prefix cache are chained over it
    dp_rank: int | None = None  # of the attention's groups or of the replicas; None: as --load-balance-method says
    bootstrap_room: int | None = None  # number of its hand-over; follow_bootstrap_room: DP rank room % dp takes it
    bootstrap: Address | None = None  # where its prefill server is met; read at decode


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Stop a request (all choices, or one). `reason` is its finish reason: "abort", or "stop" for a stop string."""

    request_id: str
    choice: int | None = None
    reason: FinishReason = "abort"


class Flush(msgspec.Struct, tag=True, frozen=True):
    """Drop the prefix cache."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End the engine: accept nothing new, run what is there until `deadline_s` has passed, then abort the rest."""

    deadline_s: float = 0.0


class Profile(msgspec.Struct, tag=True, frozen=True):
    """Record what ranks do, from step `first_step` on (0: from now), for `num_steps` steps (0: until `EndProfile`), and
    write traces called `name` into `folder`. `activities`: of "CPU" and "GPU"; `stacks`, `shapes`: where in the source
    each operation was called, and the shapes it got. Answered by `Profiled`, as everything with an `id`."""

    id: str
    folder: str
    name: str
    first_step: int = 0
    num_steps: int = 0
    activities: tuple[str, ...] = ("CPU", "GPU")
    stacks: bool = False
    shapes: bool = False


class EndProfile(msgspec.Struct, tag=True, frozen=True):
    """Record no more; answered when all is written."""

    id: str


Asked = Submit | Abort | Flush | Stop
Inbound = Asked | Profile | EndProfile


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Logprob of one token and of the likeliest (ids and values, best first), then of the tokens asked for by id."""

    logprob: float | None
    top_ids: list[int] = []
    top_logprobs: list[float] = []
    asked_logprobs: list[float] = []


class HandoverTimes(msgspec.Struct, frozen=True):
    """What the hand-over of a request took: phases one after the other, in seconds, the last of which ended at `ended`
    (of `time.monotonic` of this host).

    At prefill `meeting` is until decode asked for the prompt, `queue` until the first chunk was planned, `prefill`
    until the last was computed, `transfer` until the last byte was written; `num_bytes` moved in `writing` s. At decode
    `meeting` is until prefill was met, `queue` until memory was set aside, `waiting` until the prompt was there; the
    others are what prefill says.
    """

    meeting: float
    queue: float
    prefill: float
    transfer: float
    waiting: float | None = None  # at decode
    writing: float = 0.0
    num_bytes: int = 0
    ended: float = 0.0


class Output(msgspec.Struct, array_like=True):
    """New tokens of one choice. `finish` is set on the last one of a choice, which may carry no tokens."""

    request_id: str
    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # once, when the prompt is computed; first position has None
    finish: FinishReason | None = None
    matched: int | None = None  # the stop token that ended it
    num_prompt: int = 0
    num_cached: int = 0
    error: str | None = None
    fault: Fault | None = None  # set with `error`
    handed: HandoverTimes | None = None  # once for a request, when its prompt has gone or come
    parting: bool = False  # drawn from a prompt that goes elsewhere, with it: nobody here is told


class Outputs(msgspec.Struct, tag=True):
    """All outputs of one step."""

    items: list[Output]


class StepReport(msgspec.Struct, tag=True):
    """What one step did, for logs and metrics. Labels are derived from the ranges; nothing decides by them."""

    index: int
    label: str  # EXTEND, MIXED, DECODE, TARGET_VERIFY, IDLE, PREBUILT
    num_new_seq: int = 0
    num_new_token: int = 0
    num_cached_token: int = 0
    num_running: int = 0
    num_queued: int = 0
    num_pages_used: int = 0
    num_pages: int = 0
    num_slots_used: int = 0
    num_slots: int = 0
    num_cached_pages: int = 0  # pages that only the prefix cache holds
    num_preempted: int = 0
    num_output_token: int = 0
    seconds: float = 0.0
    dp_rank: int = 0
    busiest: bool = True  # of the DP ranks of the step the one that computed most: its label is the step's
    num_meeting: int = 0  # requests that wait for the other server, or at decode for memory
    num_leases: int = 0  # prompts that are being written here, or from here


class Ready(msgspec.Struct, tag=True):
    """The engine can serve. `info` is the resolved configuration with its decisions and sizes."""

    info: dict[str, object]


class Fatal(msgspec.Struct, tag=True):
    """The engine ends, and why."""

    error: str
    kind: str = "error"


class Profiled(msgspec.Struct, tag=True):
    """The answer to `id`: why it cannot be, or the files that were written."""

    id: str
    error: str | None = None
    files: list[str] = []


class Tick(msgspec.Struct, tag=True):
    """The step loop is alive though it has nothing to run."""

    at: float


Outbound = Outputs | StepReport | Ready | Fatal | Tick | Profiled


def choice_seed(seed: int, choice: int) -> int:
    """Seed with which choice `choice` draws: the request's own for the first, mixed (splitmix64) for the others."""
    if choice == 0:
        return seed
    z = (seed + choice * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF
