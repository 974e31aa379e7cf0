"""A sequence: one choice of a request, wherever it is (queued, in a row, waiting for its fork)."""

from __future__ import annotations

from collections.abc import Collection

import msgspec
import numpy as np

from tessera.core.messages import Fault, FinishReason, Output, SamplingParams, Submit, choice_seed
from tessera.plan.handoff import Start, drawn_first, num_moved
from tessera.plan.prefix import Node
from tessera.plan.step import Ints


class Sequence(msgspec.Struct, eq=False):
    """One choice of a request, made once for each: hence a struct, which costs a tenth of a dataclass.

    `tokens`: what was known when it was last outside a row (prompt, and what was generated before a preemption).
    `goal`: number of positions it computes at most; the token drawn last is never computed. `draws`: False when the
    prompt is only scored. `forks`: choices that wait until all of the prompt but its last token is computed here; each
    then computes that token itself. `leader` is who they wait for. `num_computed` is kept while a prompt is being
    computed; the row table has it later.
    `node`: deepest node of the prefix tree whose page it holds, `num_published` pages deep.
    `key`: its hand-over, -1 when there is none or it is past (see `handoff.py`). `route`: at prefill, where it goes;
    `num_sent` of its pages are on their way; those of them that the prefix tree had too are kept in `swapped`.
    """

    request_id: str
    choice: int
    tokens: Ints
    num_prompt: int
    params: SamplingParams
    seed: int
    goal: int
    arrival: int
    priority: int = 0
    namespace: str = ""
    forks: tuple[Sequence, ...] = ()
    leader: Sequence | None = None
    row: int = -1
    slot: int = -1
    num_computed: int = 0
    num_cached: int = 0
    num_published: int = 0
    node: Node | None = None
    dp_rank: int = 0
    entered: bool = False
    live: bool = True
    key: int = -1
    route: Start | None = None
    num_sent: int = 0
    swapped: tuple[int, ...] = ()

    @property
    def draws(self) -> bool:
        """Tokens are drawn; False when the prompt is only scored."""
        return self.params.max_new_tokens > 0

    @property
    def num_known(self) -> int:
        """Tokens known when it was last outside a row."""
        return len(self.tokens)

    @property
    def target(self) -> int:
        """Position that the computation of its prompt runs to: one short of the known tokens where whoever forks from
        it, or takes it over, computes the last one."""
        return min(len(self.tokens) - bool(self.forks), self.goal)

    @property
    def reusable(self) -> int:
        """Most tokens whose pages may come from the prefix cache. What is sent is sent by the step that computes it."""
        return min(self.logits_from, self.target - (self.route is not None))

    @property
    def logits_from(self) -> int:
        """First position whose logits are needed. Prompt logprobs are the first choice's and are given once."""
        last = len(self.tokens) - 1
        if self.params.prompt_logprobs < 0 or self.choice or len(self.tokens) > self.num_prompt:
            return last
        return min(max(self.params.logprob_start - 1, 0), last)

    def end(self, reason: FinishReason, error: str | None = None, fault: Fault | None = None) -> Output:
        """The output that ends it."""
        return Output(
            self.request_id,
            self.choice,
            [],
            finish=reason,
            num_prompt=self.num_prompt,
            num_cached=self.num_cached,
            error=error,
            fault=fault,
        )


def given(submit: Submit, max_context: int, arrival: int) -> Sequence:
    """The sequence of a request whose prompt another server will have: all choices go on from there."""
    (sequence, *_) = choices(submit, max_context, arrival)
    sequence.params = msgspec.structs.replace(submit.params, max_new_tokens=int(drawn_first(submit)))
    sequence.goal = num_moved(submit, sequence.num_prompt)
    return sequence


def choices(submit: Submit, max_context: int, arrival: int) -> list[Sequence]:
    """The sequences of a request, first choice first; `arrival` counts on from the one given."""
    tokens = np.array(submit.tokens, np.int32)
    num_prompt, params = len(tokens), submit.params
    goal = max(min(num_prompt + params.max_new_tokens, max_context) - 1, num_prompt)
    name, priority, namespace = submit.request_id, submit.priority, submit.namespace
    sequences = []
    for i in range(submit.n):
        seed = choice_seed(params.seed, i)
        sequences.append(Sequence(name, i, tokens, num_prompt, params, seed, goal, arrival + i, priority, namespace))
    return sequences


def grouped(sequences: Collection[Sequence]) -> tuple[Sequence, ...]:
    """Choices that share a prompt and wait together: the first leads, the others fork from it. Returns what to queue.

    A prompt of one token leaves nothing to share.
    """
    queued = tuple(sequences)
    if len(queued) > 1 and queued[0].num_prompt > 1:
        queued[0].forks = queued[1:]
        for other in queued[1:]:
            other.leader = queued[0]
        queued = queued[:1]
    for sequence in queued:
        sequence.leader = None
    return queued
