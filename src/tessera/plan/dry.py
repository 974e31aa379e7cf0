"""Steps for their time: of sequences that nobody asked for, in rows where nobody sits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tessera.plan.config import PlannerConfig
from tessera.plan.halves import cuts
from tessera.plan.step import Part, Step, ints

PROMPT = 2048  # tokens of a sequence where a step holds several
PREFIX = 1024  # tokens before those of a step of decodes


def largest(config: PlannerConfig) -> int:
    """Tokens of the largest part that may be planned; without any limit, of one prompt."""
    if config.chunk_size > 0:
        prompts = max(config.chunk_size, config.alone_size)
        prompts = min(prompts, config.max_prefill_tokens) if config.max_prefill_tokens > 0 else prompts
    else:
        prompts = max(config.max_prefill_tokens, config.max_context)
    held = min(config.max_running * config.max_context, (config.num_pages - 1) * config.page_size)
    return min(max(prompts, config.max_running), held)


def dry_step(config: PlannerConfig, num_tokens: int, halves: bool = False) -> Step:
    """A step of `num_tokens` tokens on every DP rank, whole or cut as the planner would.

    As many tokens as there are rows, or fewer, are decodes; else they are prompts from their start, two at least where
    there are two rows. All of them draw. It changes nothing: of rows where nobody sits all pages are page 0, and the
    slot is slot 0.
    """
    decodes = num_tokens <= config.max_running
    longest = min(PROMPT, config.max_context)
    count = num_tokens if decodes else min(max(2, -(-num_tokens // longest)), config.max_running)
    each, more = divmod(num_tokens, count)
    lengths = ints([each + (i < more) for i in range(count)])
    starts = np.full(count, min(PREFIX, config.max_context - 1) if decodes else 0, np.int32)
    part = Part(np.arange(count, dtype=np.int32), starts, lengths, np.ones_like(lengths), np.ones(count, np.bool_))
    step = Step(0, (part,) * config.num_dp)
    return replace(step, cuts=cuts(step.parts, config.split_share, config.split_grain)) if halves else step
